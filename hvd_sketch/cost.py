"""How long a step takes, before anything is run: its messages, its bytes over the bandwidth, its local work.

The model is LogGP: every message keeps a core busy for a while, messages that wait for one another take a latency each,
and bytes move at the bandwidth of the link or of the transport, whichever is less: the transport's work overlaps the
wire's. ``python -m benchmarks.network.plan_check`` holds it against measured exchanges.

Source: Alexandrov et al., LogGP: incorporating long messages into the LogP model, 1995.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log2

from hvd_sketch.at_ratio import Shapes, bytes_of, collectives_of, configurations, elements_of, kept_bytes, title_of
from hvd_sketch.config import Compression, LowRankConfig
from hvd_sketch.exchange.dense import MOST_BESIDE
from hvd_sketch.exchange.matrices import sides_of
from hvd_sketch.measured_costs import CPU, Carrier, Works
from hvd_sketch.rank_grid import is_grid, messages_of
from hvd_sketch.wire_bytes import DENSE_BYTES

POWERSGD_RANK = 4
TOP_SHARE = 0.001  # of the coordinates, that local top-k sends: as Deep Gradient Compression does
ENTRY_BYTES = 8  # of local top-k: a position and a value
BUCKET_BYTES = 25 << 20  # of DistributedDataParallel: the last one travels when the backward pass is over
OVERLAPPED = ("dense", "bf16", "powersgd")  # by DistributedDataParallel, its hooks included
ROUND_PASSES = 6  # what a round of LocalSteps takes beside its exchange, in dense means: 3.0 instead of 0.5 ns


@dataclass(frozen=True)
class Network:
    """What connects the ranks.

    Attributes:
        ranks: one for every link.
        bytes_per_s: of each rank's link, one way; both ways are used at once.
        latency_s: of a message.
        carrier: the transport.
        per_host: ranks that share each link: they exchange as ``levels=2`` does, all methods alike.
    """

    ranks: int
    bytes_per_s: float
    latency_s: float
    carrier: Carrier
    per_host: int = 1

    @property
    def share(self) -> float:
        """Of a collective's ring bytes, what one rank sends."""
        return (self.ranks - 1) / self.ranks

    @property
    def allreduce_rounds(self) -> int:
        """Messages of a library's allreduce that wait for one another."""
        return 2 * (ceil(log2(self.ranks)) if self.carrier.has_tree else self.ranks - 1)

    def inside_s(self, dim: int) -> float:
        """Of a dense mean inside of every host, and of handing the result on to its ranks."""
        if self.per_host == 1:
            return 0.0
        carrier, passes = self.carrier, DENSE_BYTES / 4 * (self.per_host - 1) / self.per_host + 1
        waited = 3 * (carrier.collective_s + carrier.wake_s + (self.per_host - 1) * carrier.message_s)
        return waited + passes * 4 * dim / carrier.bytes_per_s


@dataclass(frozen=True)
class Method:
    """What one way to average a gradient takes of a rank.

    Attributes:
        title: for a table.
        local_s: of one core, whatever the network is.
        collectives: of an exchange.
        wakes: collectives of it that follow local work.
        messages: that a rank sends in it, one after the other.
        rounds: messages of it that wait for one another.
        sent_bytes, received_bytes: of a rank and exchange.
        kept_bytes: of memory beside the model and its optimizer.
        inside_s: of the ranks of a host among themselves.
        overlapped: share of the network's time that may pass during the backward pass.
        every: steps of an exchange.
        config: what to give to ``DistributedOptimizer``, if this package has it.
    """

    title: str
    local_s: float
    collectives: int
    wakes: int
    messages: int
    rounds: int
    sent_bytes: float
    received_bytes: float
    kept_bytes: float
    inside_s: float = 0.0
    overlapped: float = 0.0
    every: int = 1
    config: Compression | None = None

    def network_s(self, network: Network) -> float:
        """Of an exchange, all but the local work."""
        carrier, moved = network.carrier, max(self.sent_bytes, self.received_bytes)
        waited = self.collectives * carrier.collective_s + self.wakes * carrier.wake_s
        waited += self.messages * carrier.message_s
        waited += self.rounds * network.latency_s
        return self.inside_s + waited + moved / min(network.bytes_per_s, carrier.bytes_per_s)

    def seconds(self, network: Network) -> float:
        """Of an exchange, from the gradient to its average."""
        return self.local_s + self.network_s(network)

    def step_s(self, network: Network, backward_s: float) -> float:
        """Of a step, on average: the backward pass, and of the exchange what does not travel meanwhile.

        Args:
            backward_s: what a step takes without its exchange.
        """
        hidden_s = min(backward_s, self.overlapped * self.network_s(network))
        return backward_s + (self.seconds(network) - hidden_s) / self.every


@dataclass(frozen=True)
class Workload:
    """What is exchanged, and how.

    Attributes:
        shapes: of the tensors that are compressed.
        ratio: bytes of a dense ring allreduce over those of ours, of these tensors; low rank takes the small ones, too,
            and stays below the ratio where it cannot reach it.
        works: local work by method; methods without one are left out.
        bits: of a value of ours.
        every: steps of an exchange of ours, as of ``LocalSteps``.
        overlaps: whether other methods exchange during the backward pass, as ``DistributedDataParallel`` does.
        backward_s: what a step takes without its exchange.
        small: shapes of tensors that go dense beside single coordinates.
        device: where the exchange is, "cpu" or "cuda".
    """

    shapes: Shapes
    ratio: float
    works: Works = field(default_factory=lambda: CPU)
    bits: int = 4
    every: int = 1
    overlaps: bool = True
    backward_s: float = 0.0
    small: Shapes = ()
    device: str = "cpu"

    @property
    def dim(self) -> int:
        """How many coordinates are compressed."""
        return elements_of(self.shapes)

    @property
    def elements(self) -> int:
        """How many there are in all."""
        return self.dim + elements_of(self.small)


def methods(workload: Workload, network: Network) -> dict[str, Method]:
    """Every way to average the gradient of a model, by a short name."""
    found = _of_others(workload, network) | _ours(workload, network)
    return {name: method for name, method in found.items() if name in workload.works}


def _of_others(workload: Workload, network: Network) -> dict[str, Method]:
    elements, rounds, share = workload.elements, network.allreduce_rounds, network.share
    dense = DENSE_BYTES * elements * share
    top = ENTRY_BYTES * max(round(TOP_SHARE * elements), 1) * (network.ranks - 1)
    factors = DENSE_BYTES * sum(min(POWERSGD_RANK, *sides) * sum(sides) for sides in map(sides_of, workload.shapes))
    with_small = factors + DENSE_BYTES * elements_of(workload.small)
    overlapped = 1 - min(1.0, BUCKET_BYTES / (4 * elements)) if workload.overlaps else 0.0

    def method(name: str, title: str, collectives: int, wakes: int, rounds: int, sent: float, kept: float) -> Method:
        local_s = _local_s(workload, name)
        inside_s = network.inside_s(elements)
        made = Method(title, local_s, collectives, wakes, rounds, rounds, sent, sent, kept, inside_s)
        return replace(made, overlapped=overlapped) if name in OVERLAPPED else made

    return {
        "dense": method("dense", "dense float32", 1, 0, rounds, dense, 0),
        "bf16": method("bf16", "dense bfloat16", 1, 1, rounds, dense / 2, 0),
        # Two allgathers, which have half the rounds of an allreduce.
        "topk": method("topk", f"local top-k, {TOP_SHARE:.1%}", 2, 1, rounds, top, 8 * elements),
        "powersgd": method(
            *("powersgd", f"PowerSGD, rank {POWERSGD_RANK}", 2, 2, 2 * rounds),
            *(with_small * share, 4 * elements + factors / 2),
        ),
    }


def _ours(workload: Workload, network: Network) -> dict[str, Method]:
    """Every rank sends each collective's messages directly to all others, in one round; in a grid of many ranks in two.

    The agreement before a step, a small allreduce of the library's, is taken to do so, too.
    """
    ranks, can_split = network.ranks, network.carrier.can_split
    messages, rounds = (messages_of(ranks), 2) if is_grid(ranks) and can_split else (ranks - 1, 1)
    every, small, found = workload.every, workload.small, {}
    made = configurations(workload.shapes, workload.ratio, ranks, workload.bits, small, can_split)
    for name, config in made.items():
        is_low_rank = isinstance(config, LowRankConfig)
        shapes = [*workload.shapes, *small] if is_low_rank else workload.shapes
        beside = 0 if is_low_rank else elements_of(small)  # elements
        sent = (bytes_of(config, shapes, ranks, can_split) + DENSE_BYTES * beside) * network.share
        kept = kept_bytes(config, shapes, workload.device)
        kept += 8 * workload.elements if every > 1 else 0  # where a round began, and a momentum
        collectives, local_s = collectives_of(name, config), _local_s(workload, name)
        collectives += 2 if beside > MOST_BESIDE else 0  # fewer travel in the others'
        if every > 1:
            local_s += ROUND_PASSES * _local_s(workload, "dense")
        found[name] = Method(
            title_of(name, config, workload.ratio, shapes, ranks, can_split),
            *(local_s, collectives, collectives, collectives * messages, collectives * rounds),
            *(sent, sent, kept),
            inside_s=network.inside_s(workload.elements),
            every=every,
            config=config,
        )
    return found


def _local_s(workload: Workload, name: str) -> float:
    return workload.works[name].seconds(workload.dim) if name in workload.works else 0.0


def faster_below(
    ours: Method, network: Network, others: Sequence[Method], backward_s: float = 0.0, gain: float = 1.0
) -> float:
    """The bandwidth, bytes per second, below which a step of ours is ``gain`` times as fast as each of some others'.

    Infinite where it always is, 0 where it never is.
    """

    def is_faster(bytes_per_s: float) -> bool:
        there = replace(network, bytes_per_s=bytes_per_s)
        return gain * ours.step_s(there, backward_s) < min(other.step_s(there, backward_s) for other in others)

    low, high = 1e3, 1e12
    if not is_faster(low):
        return 0.0
    if is_faster(high):
        return float("inf")
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return low
