"""PowerSGD as torch ships it for DDP (Vogels et al., NeurIPS 2019), all gradients in one bucket, over a Transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
RANK = 4  # of the matrices, by default; higher => closer to dense, more bytes


class TransportGroup(dist.ProcessGroup):
    """A Transport as a process group of torch, so that the hook meets the same network as all others.

    With ``wire_dtype`` tensors travel and are summed in that dtype.
    """

    def __init__(self, transport: Transport, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(transport.rank, transport.size)
        self._transport = transport
        self._wire_dtype = wire_dtype

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        summed: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        summed.set_result([self._sum_(tensor) if tensor.numel() else tensor for tensor in tensors])
        return torch._C._distributed_c10d._create_work_from_future(summed)

    def _sum_(self, tensor: Tensor) -> Tensor:
        if self._wire_dtype is None:
            return self._transport.allreduce_(tensor)
        return tensor.copy_(self._transport.allreduce_(tensor.to(self._wire_dtype)))


def bucket_of(flat: Tensor, parts: list[Tensor]) -> SimpleNamespace:
    """What the hook asks of DDP's bucket: one flat gradient, and the parameters' own parts of it."""
    return SimpleNamespace(buffer=lambda: flat, gradients=lambda: parts, index=lambda: 0, is_last=lambda: True)


class PowerSGD(WholeGradient):
    """Averages a gradient in place, by matrices of low rank.

    Args: as for an exchange; ``shapes`` say where the matrices are in the gradient, or else ``parameters`` do.
        rank: of the matrices.
        wire_dtype: of the factors on the wire; default: float32.
    """

    def __init__(
        self,
        config: SketchConfig | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        *,
        rank: int = RANK,
        wire_dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(config, dim, transport, device, **options)
        shapes = list(options.get("shapes") or [shape for _, shape, _ in options.get("parameters", ())])
        if sum(map(prod, shapes)) != dim:
            raise ValueError(f"PowerSGD needs shapes that make up the gradient of {dim} elements, got {shapes}")
        self._shapes = shapes
        group = TransportGroup(self._comm, wire_dtype)
        self._state = PowerSGDState(group, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        self._state.iter = self._state.start_powerSGD_iter  # compress from the first step on, as the others do
        self._draw_factors(rank)

    def _draw_factors(self, rank: int) -> None:
        """The first right factors, equal on all ranks. The hook would draw them from torch's global generator, which
        ranks that are threads share."""
        rows = cols = 0
        for n, m in ((shape[0], prod(shape[1:])) for shape in self._shapes):
            own_rank = min(n, m, rank)
            if (n + m) * own_rank * self._state.min_compression_rate < n * m:
                rows, cols = rows + n * own_rank, cols + m * own_rank
        drawn = torch.randn(cols, generator=torch.Generator().manual_seed(0))
        self._state.p_memory_dict[0] = torch.zeros(rows, device=self._device)
        self._state.q_memory_dict[0] = drawn.to(self._device)

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

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        kept = {name: deepcopy(state[name]) for name in KEPT}
        load_counters = super().read_state(state)

        def take_over() -> None:
            load_counters()
            for name, value in kept.items():
                setattr(self._state, name, value)

        return take_over
