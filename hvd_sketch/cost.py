"""How long an exchange takes, before anything is run: bytes over bandwidth, collectives times latency, local work.

The model is that of every textbook on collectives, alpha and beta, with two measured constants of each transport and
one of each method. ``python -m benchmarks.network.plan_check`` holds it against measured exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.matrices import as_matrices, least_bytes, sides_of
from hvd_sketch.wire_bytes import DENSE_BYTES, coded_bytes, step_bytes

Shapes = Sequence[tuple[int, ...]]
FACTOR_BITS = 4  # of our low rank
POWERSGD_RANK = 4
TOP_SHARE = 0.001  # of the coordinates, that local top-k sends: as Deep Gradient Compression does
ENTRY_BYTES = 8  # of local top-k: a position and a value


@dataclass(frozen=True)
class Carrier:
    """What a transport costs: measured between two hosts with a core each.

    Attributes:
        collective_s: of any collective, beside its messages.
        bytes_per_s: what it moves where the network costs nothing.
    """

    collective_s: float
    bytes_per_s: float


CARRIERS = {"mpi": Carrier(80e-6, 1.6e9), "torch": Carrier(1.6e-3, 0.8e9), "horovod": Carrier(1.6e-3, 0.8e9)}


@dataclass(frozen=True)
class Network:
    """What connects the ranks.

    Attributes:
        ranks: one for every link.
        bytes_per_s: of each rank's link, one way; both ways are used at once.
        latency_s: of a message.
        carrier: the transport.
    """

    ranks: int
    bytes_per_s: float
    latency_s: float
    carrier: Carrier

    @property
    def share(self) -> float:
        """Of a collective's ring bytes, what one rank sends."""
        return (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Method:
    """What one way to average a gradient takes of a rank.

    Attributes:
        title: for a table.
        local_s: of one core, whatever the network is.
        collectives: of a step.
        hops: messages that wait for one another.
        sent_bytes, received_bytes: of a rank and step.
        kept_bytes: of memory beside the model and its optimizer.
        ours: whether this package has it.
    """

    title: str
    local_s: float
    collectives: int
    hops: int
    sent_bytes: float
    received_bytes: float
    kept_bytes: float
    ours: bool = True

    def seconds(self, network: Network) -> float:
        """Of an exchange, from the gradient to its average."""
        carrier, moved = network.carrier, max(self.sent_bytes, self.received_bytes)
        waited = self.collectives * carrier.collective_s + self.hops * network.latency_s
        return self.local_s + waited + moved / network.bytes_per_s + moved / carrier.bytes_per_s


# Nanoseconds of one core per coordinate (Zen 3, 2.6 GHz, as in benchmarks/results). `--calibrate` measures ours.
NANOSECONDS = {
    "dense": 0.4,
    "bf16": 1.2,
    "topk": 7.0,
    "powersgd": 4.5,
    "nominate": 2.3,
    "lowrank": 5.7,
    "random": 2.7,
    "sketch": 3.0,
    "paper": 2.5,
}
COLLECTIVES = {"nominate": 3, "random": 2, "lowrank": 5, "sketch": 5, "paper": 7}  # of a step


def methods(
    shapes: Shapes, ratio: float, network: Network, nanoseconds: Mapping[str, float] = NANOSECONDS
) -> dict[str, Method]:
    """Every way to average the gradient of a model, by a short name.

    Args:
        shapes: of the tensors that are compressed.
        ratio: bytes of a dense ring allreduce over those of ours; low rank stays below it where it cannot reach it.
        network: its ranks decide about bytes and hops.
        nanoseconds: of one core and coordinate, by name.
    """
    dim, ranks = sum(map(prod, shapes)), network.ranks
    local = {name: 1e-9 * dim * each for name, each in nanoseconds.items()}
    ring = 2 * (ranks - 1)
    dense = DENSE_BYTES * dim * network.share
    top = ENTRY_BYTES * max(round(TOP_SHARE * dim), 1) * (ranks - 1)
    factors = DENSE_BYTES * sum(min(POWERSGD_RANK, *sides) * sum(sides) for sides in map(sides_of, shapes))
    found = {
        "dense": Method("dense float32", local["dense"], 1, ring, dense, dense, 0, ours=False),
        "bf16": Method("dense bfloat16", local["bf16"], 1, ring, dense / 2, dense / 2, 0, ours=False),
        "topk": Method(
            f"local top-k, {TOP_SHARE:.1%}", local["topk"], 2, ring, top, top, 2 * 4 * dim, ours=False
        ),
        "powersgd": Method(
            f"PowerSGD, rank {POWERSGD_RANK}",
            local["powersgd"],
            3,
            3 * ring,
            factors * network.share,
            factors * network.share,
            4 * dim + factors / 2,
            ours=False,
        ),
    }  # fmt: skip
    for name, config in configurations(shapes, ratio, ranks).items():
        sent = bytes_of(config, shapes, ranks) * network.share
        kept = kept_bytes(config, shapes)
        found[name] = Method(TITLES[name], local[name], COLLECTIVES[name], COLLECTIVES[name], sent, sent, kept)
    return found


TITLES = {
    "lowrank": "low rank, 4 bit",
    "nominate": "nominated, 4 bit",
    "random": "random, 4 bit",
    "sketch": "sketch, 4 bit",
    "paper": "the paper's sketch",
}


def configurations(shapes: Shapes, ratio: float, ranks: int) -> dict[str, Compression]:
    """Ours at one ratio, those that can reach it; low rank at the highest ratio that it reaches, if that is lower."""
    dim = sum(map(prod, shapes))
    highest = DENSE_BYTES * dim / least_bytes(shapes, FACTOR_BITS)
    found: dict[str, Compression] = {"lowrank": LowRankConfig(ratio=min(ratio, highest), value_bits=FACTOR_BITS)}
    settings: dict[str, dict[str, Any]] = {
        "nominate": {"candidates": "nominate"},
        "random": {"candidates": "random"},
        "sketch": {},
        "paper": {"oversample": 4, "value_bits": 32, "table_bits": 32, "momentum": 0.9},
    }
    for name, own in settings.items():
        try:
            found[name] = SketchConfig.for_wire_ratio(ratio, dim, ranks, **own)
        except ValueError:  # a ratio that leaves no coordinate
            continue
    return found


def bytes_of(config: Compression, shapes: Shapes, ranks: int) -> float:
    """Ring bytes of a step of one exchange."""
    if isinstance(config, SketchConfig):
        return step_bytes(config, sum(map(prod, shapes)), ranks)
    factors = [(m.rank * m.rows, m.rank * m.cols) for m in as_matrices(shapes, config)]
    return sum(2 * coded_bytes(count, config.value_bits) for pair in factors for count in pair)


def kept_bytes(config: Compression, shapes: Shapes) -> float:
    """Memory that an exchange keeps from step to step: residual, momentum, right factors, the table."""
    residual = 4 * sum(map(prod, shapes))
    if isinstance(config, LowRankConfig):
        return residual + 4 * sum(m.rank * m.cols for m in as_matrices(shapes, config))
    table = 4 * config.rows * config.cols if config.has_table else 0
    return residual * (2 if config.momentum else 1) + table


def break_even(ours: Method, network: Network, others: Sequence[Method]) -> float:
    """The bandwidth, bytes per second, below which ours takes less time than each of some others.

    Infinite where it always does, 0 where it never does.
    """

    def is_faster(bytes_per_s: float) -> bool:
        there = Network(network.ranks, bytes_per_s, network.latency_s, network.carrier)
        return ours.seconds(there) < min(other.seconds(there) for other in others)

    low, high = 1e3, 1e12
    if not is_faster(low):
        return 0.0
    if is_faster(high):
        return float("inf")
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return low
