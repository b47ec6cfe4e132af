"""The competitors: every way to average one gradient over the ranks, behind one interface.

All of them talk through a Transport, so that the same ledger counts their bytes and the same clock splits their time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.methods.powersgd import PowerSGD
from hvd_sketch import DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.sketched import SparseUpdate
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import Transport
from hvd_sketch.transport.metered import MeteredTransport

POWERSGD_RANK = 4
TOPK_LIKE_RATIO = 20.0  # local top-k sends as many coordinates as a sketch of this ratio updates


@dataclass
class Gradient:
    """One vector, and the parameters' own parts of it as views."""

    flat: Tensor
    parts: list[Tensor]

    @classmethod
    def over(cls, flat: Tensor, shapes: Iterable[tuple[int, ...]]) -> Gradient:
        shapes = list(shapes)
        pieces = flat.split([prod(shape) for shape in shapes])
        return cls(flat, [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])


class Method(Protocol):
    """One rank's end of one competitor. Communication: the constructor and ``average`` are collective."""

    ledger: CommLedger

    def average(self, gradient: Gradient) -> Tensor | SparseUpdate:
        """The mean over ranks that this method makes of it: float32 [dim], or sparse. May overwrite the gradient."""

    @property
    def residual(self) -> Tensor | None:
        """What this rank produced and has not sent yet, float32 [dim]; None where that is nothing."""


class Dense:
    """Ours: reduce_scatter and allgather."""

    def __init__(self, transport: Transport, dim: int) -> None:
        self._exchange = DenseAllreduce(None, dim, transport)
        self.ledger = self._exchange.ledger
        self.residual = None

    def average(self, gradient: Gradient) -> Tensor:
        return self._exchange.step(gradient.flat).values


class Sketched:
    """Ours, at a ratio of the paper's count."""

    def __init__(self, transport: Transport, dim: int, ratio: float) -> None:
        self._exchange = SketchedAllreduce(SketchConfig.for_compression(ratio, dim, momentum=0.0), dim, transport)
        self.ledger = self._exchange.ledger

    def average(self, gradient: Gradient) -> SparseUpdate:
        return self._exchange.step(gradient.flat)

    @property
    def residual(self) -> Tensor:
        return self._exchange.residual


class _Metered:
    """What the methods below share: their bytes are counted where they are sent."""

    def __init__(self, transport: Transport, dim: int) -> None:
        self.ledger = CommLedger()
        self.residual: Tensor | None = None
        self._comm = MeteredTransport(transport, self.ledger)
        self._dim = dim

    def _begin_step(self) -> None:
        self.ledger.begin_step()
        self.ledger.compare_with_dense(self._dim, 4 * self._dim, 2 * self._dim)


class LibraryAllreduce(_Metered):
    """The allreduce of MPI or Horovod itself, in place."""

    def average(self, gradient: Gradient) -> Tensor:
        self._begin_step()
        return self._comm.allreduce_(gradient.flat).div_(self._comm.size)


class HalfPrecision(_Metered):
    """Horovod's ``Compression.fp16``: summed in half precision. MPI knows no such numbers."""

    def average(self, gradient: Gradient) -> Tensor:
        self._begin_step()
        summed = self._comm.allreduce_(gradient.flat.to(torch.float16))
        return gradient.flat.copy_(summed).div_(self._comm.size)


class LocalTopK(_Metered):
    """Every rank's own ``k`` largest coordinates, gathered and added up; the rest is kept for later steps.

    Chosen with our radix select, which takes a twentieth of the time of torch.topk.
    """

    def __init__(self, transport: Transport, dim: int, k: int) -> None:
        super().__init__(transport, dim)
        self.k = k
        self.residual: Tensor = torch.zeros(dim)

    def average(self, gradient: Gradient) -> Tensor:
        self._begin_step()
        self.residual += gradient.flat
        chosen = top_k(self.residual, self.k)
        indices = self._comm.allgather(chosen.to(torch.int32))
        values = self._comm.allgather(self.residual[chosen])
        self.residual.index_fill_(0, chosen, 0)
        mean = gradient.flat.zero_()
        return mean.index_add_(0, indices.to(torch.int64), values, alpha=1 / self._comm.size)


class LowRank(_Metered):
    """PowerSGD."""

    def __init__(self, transport: Transport, dim: int, rank: int) -> None:
        super().__init__(transport, dim)
        self._powersgd = PowerSGD(self._comm, rank)

    def average(self, gradient: Gradient) -> Tensor:
        self._begin_step()
        mean = self._powersgd.average_(gradient.flat, gradient.parts)
        self.residual = self._powersgd.residual
        return mean


def topk_for(ratio: float, dim: int) -> int:
    return SketchConfig.for_compression(ratio, dim).k


METHODS: dict[str, Callable[[Transport, int], Method]] = {
    "dense": Dense,
    "allreduce": LibraryAllreduce,
    "fp16": HalfPrecision,
    "topk": lambda transport, dim: LocalTopK(transport, dim, topk_for(TOPK_LIKE_RATIO, dim)),
    "powersgd": lambda transport, dim: LowRank(transport, dim, POWERSGD_RANK),
    "sketch20": lambda transport, dim: Sketched(transport, dim, 20.0),
    "sketch100": lambda transport, dim: Sketched(transport, dim, 100.0),
}
TRANSPORTS_WITHOUT = {"fp16": ("mpi",)}


def methods_over(transport: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that exist over a transport."""
    return [name for name in names if transport not in TRANSPORTS_WITHOUT.get(name, ())]
