"""What a plan can measure of a job's network in seconds in place of assuming it: collectives, and links of hosts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hvd_sketch.commands.calibrate import waiting_for
from hvd_sketch.cost import Network
from hvd_sketch.measured_costs import CARRIERS, Carrier
from hvd_sketch.model.levels import host_name
from hvd_sketch.transport import HorovodTransport, Transport, resolve_transport
from hvd_sketch.transport.base import Splitting, gather_texts
from hvd_sketch.transport.choice import choose
from hvd_sketch.units import told_rate, told_seconds

REPEATS = 20
REPEATS_OF_LINK = 3  # of a large message: at 100 Mbit/s it takes 0.2 s
SMALL_FLOATS = 64
PROBE_FLOATS = 1 << 20  # of the whole vector: 4 MiB, as much as a large step sends
MOST_SHOWN = 10  # links


@dataclass(frozen=True)
class Probe:
    """What collectives of a job take.

    Attributes:
        collective_s: of a small one.
        bytes_per_s: of a large one, beside that.
    """

    collective_s: float
    bytes_per_s: float

    def carrier(self, known: Carrier, ranks: int) -> Carrier:
        """As a transport's, of which ``known`` tells what cannot be measured by this."""
        messages_s = max(self.collective_s - known.collective_s, 0.0)
        return replace(known, message_s=messages_s / (ranks - 1), bytes_per_s=self.bytes_per_s)


@dataclass(frozen=True)
class Link:
    """What connects two hosts.

    Attributes:
        ranks: the first of each host.
        latency_s: of a small message there and back at once.
        bytes_per_s: one way, while the other way is used as well.
    """

    ranks: tuple[int, int]
    latency_s: float
    bytes_per_s: float

    def as_record(self) -> dict[str, Any]:
        """For programs."""
        return {"ranks": list(self.ranks), "latency_s": self.latency_s, "bits_per_s": 8 * self.bytes_per_s}


@dataclass(frozen=True)
class Job:
    """What was measured of a job.

    Attributes:
        network: between its ranks; its latency is part of the carrier's time of a message.
        links: between every two hosts, the slowest first; empty on one host, or over Horovod's own collectives.
        is_first: whether this is rank 0.
    """

    network: Network
    links: Sequence[Link]
    is_first: bool

    def as_record(self) -> dict[str, Any]:
        """For programs."""
        network = self.network
        return {
            "measured_bits_per_s": 8 * network.bytes_per_s,
            "measured_message_s": network.carrier.message_s,
            "links": [link.as_record() for link in self.links],
        }

    def show(self, console: Console) -> None:
        """What the job's network moves, and a table of its slowest links."""
        network = self.network
        console.print(
            f"Measured: {told_rate(network.bytes_per_s)}, a message {told_seconds(network.carrier.message_s)}."
        )
        if not self.links:
            return
        table = Table(title=f"Slowest of {len(self.links)} links of hosts")
        for heading in ("ranks", "bandwidth", "latency"):
            table.add_column(heading, justify="right")
        for link in self.links[:MOST_SHOWN]:
            ranks = " and ".join(map(str, link.ranks))
            table.add_row(ranks, told_rate(link.bytes_per_s), told_seconds(link.latency_s))
        console.print(table)


def job_here(device: str = "cpu") -> Job:
    """The network between the ranks of this job.

    Args:
        device: where the tensors are that its collectives take. With ``"cuda"`` this has not run yet.

    Raises:
        ValueError: there is one rank.

    Communication: collective, all ranks; some seconds, and for every host a fraction of one.
    """
    transport = resolve_transport("auto")
    if transport.size < 2:
        raise ValueError("--measure needs the ranks of a job: torchrun --nproc-per-node 2 -m hvd_sketch plan …")
    name, _ = choose()
    if isinstance(transport, HorovodTransport):
        name = {"mpi": "horovod-mpi", "torch": "horovod", "horovod": "horovod-own"}[transport.carrier]
    known, probe = CARRIERS[name], probed(transport, device)
    carrier = replace(probe.carrier(known, transport.size), bytes_per_s=max(known.bytes_per_s, probe.bytes_per_s))
    network = Network(transport.size, probe.bytes_per_s, 0.0, carrier)
    return Job(network, links_of(transport, host_name()), transport.rank == 0)


def probed(transport: Transport, device: str = "cpu") -> Probe:
    """What a collective of this job takes, small or large, the slowest rank's.

    Communication: collective, all ranks; some seconds.
    """
    small = torch.zeros(SMALL_FLOATS, dtype=torch.float32, device=device)
    shares = torch.zeros(transport.size, SMALL_FLOATS, dtype=torch.float32, device=device)
    large = torch.zeros(transport.size, PROBE_FLOATS // transport.size, dtype=torch.float32, device=device)
    kinds: list[Callable[[], object]] = [
        lambda: transport.allreduce_(small),
        lambda: transport.allgather(small),
        lambda: transport.reduce_scatter(shares),
    ]
    collective_s = statistics.mean(_slowest(transport, collective, REPEATS, device) for collective in kinds)
    whole_s = _slowest(transport, lambda: transport.reduce_scatter(large), REPEATS, device)
    moved = 4 * large.numel() * (transport.size - 1) / transport.size
    return Probe(collective_s, moved / max(whole_s - collective_s, 1e-9))


def links_of(transport: Transport, host: str) -> list[Link]:
    """Between the first ranks of every two hosts, the slowest first; those of a round at once, each rank in one.

    Args:
        host: what the ranks of this host have in common.

    Communication: collective, all ranks.
    """
    hosts = gather_texts(transport, host)
    firsts = sorted({hosts.index(each) for each in hosts})
    if len(firsts) < 2 or not isinstance(transport, Splitting):
        return []
    try:
        among = transport.split(int(transport.rank in firsts))
    except ValueError:  # on every rank: Horovod's own collectives
        return []
    found = [_link(among, pairs, firsts) for pairs in rounds_of(len(firsts))] if transport.rank in firsts else []
    rows = torch.tensor([row for row in found if row], dtype=torch.float64, device="cpu").view(-1, 4)
    links = [Link((int(a), int(b)), latency_s, rate) for a, b, latency_s, rate in transport.allgather(rows).tolist()]
    return sorted(links, key=lambda link: link.bytes_per_s)


def rounds_of(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of ``count`` players in as few rounds as there can be, each player at most once in a round."""
    circle = list(range(count + count % 2))  # the last of an odd number of players has a rest
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = zip(circle, circle[::-1], strict=True)
        rounds.append([(min(pair), max(pair)) for pair in list(pairs)[: len(circle) // 2] if max(pair) < count])
        circle[1:] = circle[-1:] + circle[1:-1]
    return rounds


def _link(among: Any, pairs: Sequence[tuple[int, int]], firsts: Sequence[int]) -> list[float]:
    """Ranks, latency and bandwidth of this host's pair, on one of its two ranks. Communication: collective."""
    own = next((pair for pair in pairs if among.rank in pair), None)
    pair = among.split(pairs.index(own) if own else len(pairs))
    if own is None:
        return []
    small = torch.zeros(2, SMALL_FLOATS, dtype=torch.float32, device="cpu")
    large = torch.zeros(2, PROBE_FLOATS // 2, dtype=torch.float32, device="cpu")
    latency_s = _slowest(pair, lambda: pair.alltoall(small), REPEATS)
    whole_s = _slowest(pair, lambda: pair.alltoall(large), REPEATS_OF_LINK)
    rate = large[0].nbytes / max(whole_s - latency_s, 1e-9)
    return [firsts[own[0]], firsts[own[1]], latency_s, rate] if pair.rank == 0 else []


def _slowest(transport: Transport, collective: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Median seconds of a collective on the slowest rank. Communication: collective, as often on every rank."""
    wait = waiting_for(device)
    collective()
    spent = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        collective()
        wait()
        spent.append(time.perf_counter() - start)
    own = torch.tensor([statistics.median(spent)], dtype=torch.float64, device="cpu")
    return max(float(value) for value in transport.allgather(own))
