"""The competitors: every way to average one gradient over the ranks, behind the interface of our own exchanges.

All of them talk through a metered Transport, so that the same ledger counts their bytes and the same clock splits
their time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.methods.allreduce import HalfPrecision, LibraryAllreduce
from benchmarks.methods.powersgd import PowerSGD
from benchmarks.methods.top_k import LocalTopK
from hvd_sketch import (
    DenseAllreduce,
    LowRankAllreduce,
    LowRankConfig,
    SketchConfig,
    SketchedAllreduce,
    Transport,
)
from hvd_sketch.exchange.base import Exchange, Parameters
from hvd_sketch.exchange.matrices import least_bytes
from hvd_sketch.wire_bytes import DENSE_BYTES

TOPK_LIKE_RATIO = 20.0  # local top-k sends as many coordinates as a sketch of this ratio updates
FEW_BIT_RATIO = 150.0  # of bytes on the wire


# From this rank's end of the network, the length of the gradient, what it is made of, and the device that holds it
# (default: the CPU). Communication: collective.
Method = Callable[..., Exchange]
CPU = torch.device("cpu")


def _method(kind: type[Exchange], ratio: float | None = None) -> Method:
    def build(transport: Transport, dim: int, parameters: Parameters, device: torch.device = CPU) -> Exchange:
        config = None if ratio is None else SketchConfig.for_compression(ratio, dim, momentum=0.0)
        return kind(config, dim, transport, device, parameters=parameters)

    return build


def _nominated(transport: Transport, dim: int, parameters: Parameters, device: torch.device = CPU) -> Exchange:
    config = SketchConfig.for_wire_ratio(FEW_BIT_RATIO, dim, transport.size, candidates="nominate")
    return SketchedAllreduce(config, dim, transport, device, parameters=parameters)


def _low_rank(transport: Transport, dim: int, parameters: Parameters, device: torch.device = CPU) -> Exchange:
    shapes = [shape for _, shape, _ in parameters]
    highest = DENSE_BYTES * dim / least_bytes(shapes, bits=4)  # at rank 1
    config = LowRankConfig(ratio=min(FEW_BIT_RATIO, highest))
    return LowRankAllreduce(config, dim, transport, device, parameters=parameters, shapes=shapes)


METHODS: dict[str, Method] = {
    "dense": _method(DenseAllreduce),
    "allreduce": _method(LibraryAllreduce),
    "fp16": _method(HalfPrecision),
    "topk": _method(LocalTopK, TOPK_LIKE_RATIO),
    "powersgd": _method(PowerSGD),
    "sketch20": _method(SketchedAllreduce, 20.0),
    "sketch100": _method(SketchedAllreduce, 100.0),
    "nominate150": _nominated,
    "lowrank150": _low_rank,
}
TRANSPORTS_WITHOUT = {"fp16": ("mpi",)}


def methods_over(transport: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that exist over a transport."""
    return [name for name in names if transport not in TRANSPORTS_WITHOUT.get(name, ())]
