"""PowerSGD as torch ships it for DDP (Vogels et al., NeurIPS 2019), all gradients in one bucket, over a Transport."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from math import prod
from types import SimpleNamespace
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from benchmarks.methods.base import WholeGradient
from hvd_sketch import SketchConfig, Transport
from hvd_sketch.exchange.base import Options

KEPT = ("error_dict", "p_memory_dict", "q_memory_dict", "iter")  # of torch's state, from step to step
RANK = 4  # of the matrices; higher => closer to dense, more bytes


class TransportGroup(dist.ProcessGroup):
    """A Transport as a process group of torch, so that the hook meets the same network as all others."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.rank, transport.size)
        self._transport = transport

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        summed: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        summed.set_result([self._transport.allreduce_(tensor) if tensor.numel() else tensor for tensor in tensors])
        return torch._C._distributed_c10d._create_work_from_future(summed)


def bucket_of(flat: Tensor, parts: list[Tensor]) -> SimpleNamespace:
    """What the hook asks of DDP's bucket: one flat gradient, and the parameters' own parts of it."""
    return SimpleNamespace(buffer=lambda: flat, gradients=lambda: parts, index=lambda: 0, is_last=lambda: True)


class PowerSGD(WholeGradient):
    """Averages a gradient in place, by matrices of rank ``RANK``.

    Args: as for an exchange; ``parameters`` say where the matrices are in the gradient.
    """

    def __init__(
        self,
        config: SketchConfig | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        shapes = [shape for _, shape, _ in options.get("parameters", ())]
        if sum(map(prod, shapes)) != dim:
            raise ValueError(f"PowerSGD needs parameters that make up the gradient of {dim} elements, got {shapes}")
        self._shapes = shapes
        self._state = PowerSGDState(TransportGroup(self._comm), matrix_approximation_rank=RANK, start_powerSGD_iter=2)
        self._state.iter = self._state.start_powerSGD_iter  # compress from the first step on, as the others do

    @property
    def residual(self) -> Tensor:
        """float32 [dim]: what this rank produced and has not sent yet."""
        return self._state.error_dict[0] if self._state.error_dict else super().residual

    def _mean_(self, gradient: Tensor) -> Tensor:
        pieces = gradient.split([prod(shape) for shape in self._shapes])
        parts = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        return powerSGD_hook(self._state, bucket_of(gradient, parts)).wait()

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        kept = {name: deepcopy(getattr(self._state, name)) for name in KEPT}
        return {**self._counters(self._comm.rank), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._load_counters(state)
        for name in KEPT:
            setattr(self._state, name, deepcopy(state[name]))
