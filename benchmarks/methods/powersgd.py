"""PowerSGD as torch ships it for DDP (Vogels et al., NeurIPS 2019), all gradients in one bucket, over a Transport."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from hvd_sketch.transport import Transport


class TransportGroup(dist.ProcessGroup):
    """A Transport as a process group of torch, so that the hook meets the same network as all others."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.rank, transport.size)
        self._transport = transport

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        summed: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        summed.set_result([self._transport.allreduce_(tensor) if tensor.numel() else tensor for tensor in tensors])
        return torch._C._distributed_c10d._create_work_from_future(summed)


class Bucket:
    """What the hook asks of DDP's bucket: one flat gradient, and the parameters' own parts of it."""

    def __init__(self, flat: Tensor, parts: list[Tensor]) -> None:
        self._flat, self._parts = flat, parts

    def buffer(self) -> Tensor:
        return self._flat

    def gradients(self) -> list[Tensor]:
        return self._parts

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


class PowerSGD:
    """Averages a gradient in place, by matrices of low rank.

    Args:
        transport: this rank's end of the network.
        rank: of the matrices. Higher => closer to dense, more bytes.
    """

    def __init__(self, transport: Transport, rank: int) -> None:
        group = TransportGroup(transport)
        self._state = PowerSGDState(group, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        self._state.iter = self._state.start_powerSGD_iter  # compress from the first step on, as the others do

    def average_(self, flat: Tensor, parts: list[Tensor]) -> Tensor:
        """``flat``, which ``parts`` are views of, becomes the mean over ranks. Communication: collective."""
        return powerSGD_hook(self._state, Bucket(flat, parts)).wait()

    @property
    def residual(self) -> Tensor:
        """float32 [dim]: what this rank produced and has not sent yet."""
        return self._state.error_dict[0]
