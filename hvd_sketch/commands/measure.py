"""What a plan can measure in seconds in place of assuming it: local work on this machine, and the network of a job."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from hvd_sketch.commands.plan import shapes_of_size
from hvd_sketch.config import Compression
from hvd_sketch.cost import NANOSECONDS, Carrier, Network, Shapes, configurations
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import Transport, local_transports, resolve_transport

LARGEST_TIMED = 4_000_000  # coordinates
LEAST_S = 0.3  # of every measurement
LEAST_REPEATS = 5
SMALL_FLOATS = 64
PROBE_FLOATS = 1 << 20  # of the whole vector: 4 MiB, as much as a large step sends


def network_of_job() -> tuple[Network, bool]:
    """The network between the ranks of this job, and whether this rank is the first.

    Raises:
        ValueError: there is one rank.

    Communication: collective, all ranks; some seconds.
    """
    transport = resolve_transport("auto")
    if transport.size < 2:
        raise ValueError("--measure needs the ranks of a job: torchrun --nproc-per-node 2 -m hvd_sketch plan …")
    return Network(transport.size, math.inf, 0.0, probed(transport)), transport.rank == 0


def nanoseconds_here(shapes: Shapes, ratio: float, ranks: int) -> dict[str, float]:
    """Local work of ours on this machine, by name and per coordinate; of a smaller model where this one is large."""
    if sum(map(math.prod, shapes)) > LARGEST_TIMED:
        shapes = shapes_of_size(LARGEST_TIMED)
    dim = sum(map(math.prod, shapes))
    ours = configurations(shapes, ratio, ranks).items()
    return {**NANOSECONDS, **{name: 1e9 * seconds_of_step(config, shapes) / dim for name, config in ours}}


def seconds_of_step(config: Compression, shapes: Shapes) -> float:
    """Of an exchange without a network: the local work of one rank, in as many threads as torch has.

    Communication: none.
    """
    (alone,), dim = local_transports(1), sum(map(math.prod, shapes))
    exchange = make_exchange(config, dim, alone, torch.device("cpu"), shapes=shapes)
    gradient = torch.randn(dim, generator=torch.Generator().manual_seed(0)).pow_(3)  # heavy-tailed, as gradients are
    own = torch.empty(dim)

    def prepare() -> None:
        own.copy_(gradient)

    return _median(lambda: exchange.step(own), prepare)


def probed(transport: Transport) -> Carrier:
    """What a collective of this job takes, small or large, the slowest rank's.

    Communication: collective, all ranks; some seconds.
    """
    small, shares = torch.zeros(SMALL_FLOATS), torch.zeros(transport.size, SMALL_FLOATS)
    large = torch.zeros(transport.size, PROBE_FLOATS // transport.size)
    kinds: list[Callable[[], object]] = [
        lambda: transport.allreduce_(small),
        lambda: transport.allgather(small),
        lambda: transport.reduce_scatter(shares),
    ]
    collective_s = statistics.mean(_slowest(transport, collective) for collective in kinds)
    whole_s = _slowest(transport, lambda: transport.reduce_scatter(large))
    moved = 4 * large.numel() * (transport.size - 1) / transport.size
    return Carrier(collective_s, moved / max(whole_s - collective_s, 1e-9))


def _slowest(transport: Transport, collective: Callable[[], object]) -> float:
    """Median seconds of a collective on the slowest rank. Communication: collective, as often on every rank."""
    collective()
    spent = []
    for _ in range(4 * LEAST_REPEATS):
        start = time.perf_counter()
        collective()
        spent.append(time.perf_counter() - start)
    own = torch.tensor([statistics.median(spent)], dtype=torch.float64)
    return max(float(value) for value in transport.allgather(own))


def _median(run: Callable[[], object], prepare: Callable[[], None]) -> float:
    spent: list[float] = []
    prepare()
    run()
    while sum(spent) < LEAST_S or len(spent) < LEAST_REPEATS:
        prepare()
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)
