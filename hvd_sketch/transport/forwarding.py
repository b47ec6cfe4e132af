"""The base class of transports around another transport."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.transport.base import Handle, Transport


class ForwardingTransport:
    """Calls the ``inner`` transport in every method; a decorator overrides the methods that it changes.

    Communication: as the inner transport.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps

    def stages(self, device: torch.device) -> bool:
        return self._inner.stages(device)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        return self._inner.allreduce_(tensor)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self._inner.reduce_scatter(tensor, ordered)

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        return self._inner.start_reduce_scatter(tensor, ordered)

    def alltoall(self, tensor: Tensor) -> Tensor:
        return self._inner.alltoall(tensor)

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._inner.allgather(tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self._inner.broadcast_(tensor, root)

    def barrier(self) -> None:
        self._inner.barrier()
