"""The competitors: every way to average one gradient over the ranks, behind the interface of our own exchanges.

All of them talk through a metered Transport, so that the same ledger counts their bytes and the same clock splits
their time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

from benchmarks.methods.allreduce import HalfPrecision, LibraryAllreduce
from benchmarks.methods.powersgd import PowerSGD
from benchmarks.methods.top_k import LocalTopK
from hvd_sketch import DenseAllreduce, SketchConfig, SketchedAllreduce, Transport
from hvd_sketch.exchange.base import Exchange, Parameters

TOPK_LIKE_RATIO = 20.0  # local top-k sends as many coordinates as a sketch of this ratio updates


class Method(Protocol):
    """Builds one rank's end of a method. Communication: collective.

    Args:
        transport: this rank's end of the network.
        dim: length of the gradient.
        parameters: what the gradient is made of, for methods that see matrices.
    """

    def __call__(self, transport: Transport, dim: int, parameters: Parameters) -> Exchange: ...


def _plain(kind: type[Exchange], transport: Transport, dim: int, parameters: Parameters) -> Exchange:
    return kind(None, dim, transport, parameters=parameters)


def _at_ratio(kind: type[Exchange], ratio: float, transport: Transport, dim: int, parameters: Parameters) -> Exchange:
    config = SketchConfig.for_compression(ratio, dim, momentum=0.0)
    return kind(config, dim, transport, parameters=parameters)


METHODS: dict[str, Method] = {
    "dense": partial(_plain, DenseAllreduce),
    "allreduce": partial(_plain, LibraryAllreduce),
    "fp16": partial(_plain, HalfPrecision),
    "topk": partial(_at_ratio, LocalTopK, TOPK_LIKE_RATIO),
    "powersgd": partial(_plain, PowerSGD),
    "sketch20": partial(_at_ratio, SketchedAllreduce, 20.0),
    "sketch100": partial(_at_ratio, SketchedAllreduce, 100.0),
}
TRANSPORTS_WITHOUT = {"fp16": ("mpi",)}


def methods_over(transport: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that exist over a transport."""
    return [name for name in names if transport not in TRANSPORTS_WITHOUT.get(name, ())]
