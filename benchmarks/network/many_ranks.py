"""From how many ranks on a grid pays: collectives and exchanges with direct messages and along rows and columns.

``launch/mpirun.sh -n 64 -- python -m benchmarks.network.many_ranks``, or another launcher. Both ways in turns, in one
run; what they give is compared before anything is timed. A time is that of the slowest rank, from a barrier on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import hvd_sketch
from benchmarks.figures import markdown
from benchmarks.network.checks import WrongResult
from benchmarks.network.clock import slowest
from benchmarks.network.records import Records, environment
from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.rank_grid import grid_of
from hvd_sketch.transport import Transport, resolve_transport
from hvd_sketch.transport.grid import GridTransport

NUMBERS = (256, 16_384, 262_144)  # float32, of a rank
DIM, RATIO = 10**6, 150
WAYS = ("direct", "grid")


def collectives(transport: Transport, numbers: int) -> dict[str, Callable[[], Tensor]]:
    """Each on a vector that a rank gives, or gets of an allgather."""
    share = -(-numbers // transport.size)
    whole = (torch.arange(share * transport.size) % 1000).float().view(transport.size, share)
    return {
        "reduce_scatter": lambda: transport.reduce_scatter(whole),
        "alltoall": lambda: transport.alltoall(whole),
        "allgather": lambda: transport.allgather(whole[transport.rank]),
        "allreduce": lambda: transport.allreduce_(whole.clone()),
    }


def exchanges(transport: Transport) -> dict[str, Callable[[], Tensor]]:
    """One step of each."""
    configs = {
        "nominated": SketchConfig.for_wire_ratio(RATIO, DIM, transport.size, candidates="nominate"),
        "sketch, 4 bit": SketchConfig.for_wire_ratio(RATIO, DIM, transport.size),
        "the paper's sketch": SketchConfig.paper(rows=5, cols=10_000, k=10_000),
    }
    # Whole numbers, whose sums have no rounding: both ways give the same bits.
    gradient = (1000 * torch.randn(DIM, generator=torch.Generator().manual_seed(transport.rank)) ** 3).round()

    def step(exchange: SketchedAllreduce) -> Tensor:
        return exchange.step(gradient).values

    return {name: partial(step, SketchedAllreduce(config, DIM, transport)) for name, config in configs.items()}


def timed(transport: Transport, calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, in turns.

    Raises:
        WrongResult: the ways differ.
    """
    direct, grid = (call() for call in calls.values())
    if slowest(transport, float(not torch.equal(direct, grid)))[0]:
        raise WrongResult("direct messages and a grid do not give the same")
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            transport.barrier()
            start_s = time.perf_counter()
            call()
            seconds[way] += slowest(transport, time.perf_counter() - start_s)
    return {way: statistics.median(of_way) for way, of_way in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a record for each line to this file")
    arguments = parser.parse_args()
    transport = resolve_transport("auto")
    if grid_of(transport.size)[0] == 1:
        parser.error(f"a grid needs at least 4 ranks, and not a prime number of them, got {transport.size}")
    ways = {"direct": transport, "grid": GridTransport(transport)}
    torch.set_num_threads(1)
    found = {}
    for numbers in NUMBERS:
        every = {way: collectives(over, numbers) for way, over in ways.items()}
        for name in every["direct"]:
            calls = {way: every[way][name] for way in WAYS}
            found[f"{name}, {4 * numbers / 1024:.0f} KiB"] = timed(transport, calls, arguments.repeats)
    every = {way: exchanges(over) for way, over in ways.items()}
    for name in every["direct"]:
        calls = {way: every[way][name] for way in WAYS}
        found[f"{name}, {DIM / 1e6:.0f} M"] = timed(transport, calls, arguments.repeats)
    if transport.rank != 0:
        return
    kind = type(transport).__name__
    rows = [
        (name, *(f"{1e3 * times[way]:.1f}" for way in WAYS), f"{times['grid'] / times['direct']:.2f}")
        for name, times in found.items()
    ]
    print(f"{kind}, {transport.size} ranks, hvd_sketch {hvd_sketch.__version__}; milliseconds of the slowest rank")
    print(markdown("what | direct | grid | grid over direct", rows))
    if arguments.json is not None:
        for name, times in found.items():
            Records(arguments.json).append(
                {"transport": kind, "ranks": transport.size, "what": name, **times, **environment()}
            )


if __name__ == "__main__":
    main()
