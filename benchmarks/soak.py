"""Many small steps: does memory grow, do descriptors or threads stay open, do steps get slower?

``launch/mpirun.sh -n 2 -- python -m benchmarks.soak --steps 10000``, or by ``launch/torchrun.sh`` or
``launch/horovodrun.sh``. Ends with status 1 where in the last half resident memory grows by more than ``--limit-mb``,
steps get slower by more than ``--limit-percent``, threads become more or the number of descriptors changes. ``--trace``
names the lines of Python whose memory grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

import hvd_sketch
from benchmarks.figures import markdown
from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.transport import Transport, resolve_transport

SAMPLES = 20
COMPRESSIONS: dict[str, Compression | None] = {
    "nominate": SketchConfig(k=40, candidates="nominate"),
    "sketch": SketchConfig(k=40, cols=100),
    "paper": SketchConfig.paper(k=20, cols=100),
    "random": SketchConfig(k=40, candidates="random"),
    "low rank": LowRankConfig(rank=1),
    "dense": None,
}
HEAD = "rank | step | resident MB | largest mapping that grew since half | descriptors | threads | ms per step"


@dataclass(frozen=True)
class Sample:
    """What a process holds after some steps.

    Attributes:
        mappings: resident bytes by the name of the mapped file, or "[heap]", "[stack]", "anonymous".
        seconds: per step, since the sample before.
    """

    step: int
    mappings: dict[str, int]
    descriptors: int
    threads: int
    seconds: float

    @property
    def resident(self) -> int:
        """Bytes."""
        return sum(self.mappings.values())


def main() -> None:
    arguments = parse_arguments()
    transport = resolve_transport(arguments.transport)
    step = training_step(transport, COMPRESSIONS[arguments.compression])
    if transport.rank == 0:
        print(markdown(HEAD, []), flush=True)
    samples, traced = soak(step, arguments.steps, transport.rank, arguments.trace)
    limits = arguments.limit_mb, arguments.limit_percent
    faults = faults_of(samples, *((float("inf"), float("inf")) if arguments.trace else limits))  # it takes both itself
    for line in [*traced, *faults]:
        print(f"rank {transport.rank}: {line}", flush=True)
    any_fault = transport.allreduce_(torch.tensor([len(faults)]))
    sys.exit(int(bool(any_fault)))


def training_step(transport: Transport, compression: Compression | None) -> Callable[[], None]:
    """A step of a model of 4,900 weights, which go compressed, and 90 biases, which go dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 70), nn.Tanh(), nn.Linear(70, 20))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd_sketch.DistributedOptimizer(inner, model.named_parameters(), compression, transport)
    generator = torch.Generator().manual_seed(transport.rank)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 50, generator=generator)).square().mean().backward()
        optimizer.step()

    return step


def soak(step: Callable[[], None], steps: int, rank: int, trace: bool) -> tuple[list[Sample], list[str]]:
    """Samples at equal distances, printed as they come, and the lines of Python whose memory grew in the last half."""
    samples: list[Sample] = []
    done, half = 0, None
    for number in range(1, SAMPLES + 1):
        before, started = done, time.perf_counter()
        while done < number * steps // SAMPLES:
            step()
            done += 1
        samples.append(sample(done, (time.perf_counter() - started) / max(done - before, 1)))
        print(row(samples, rank), flush=True)
        if trace and number == SAMPLES // 2:
            tracemalloc.start(8)
        if trace and number == SAMPLES // 2 + 1:  # what is made once, after the start, is no growth
            half = tracemalloc.take_snapshot()
    if half is None:
        return samples, []
    grown = tracemalloc.take_snapshot().compare_to(half, "lineno")
    tracemalloc.stop()  # with it Python is several times as slow
    return samples, [f"Python: {line}" for line in grown[:10] if line.size_diff > 0]


def sample(step: int, seconds: float) -> Sample:
    """Measure this process, after what was freed has been given back."""
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    threads = len(os.listdir("/proc/self/task"))
    return Sample(step, mappings(), len(os.listdir("/proc/self/fd")), threads, seconds)


def mappings() -> dict[str, int]:
    """Resident bytes of this process, by what is mapped."""
    resident: dict[str, int] = defaultdict(int)
    name = "anonymous"
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if words[0] == "Rss:":
            resident[name] += 1024 * int(words[1])
        elif not words[0].endswith(":"):
            name = words[5] if len(words) == 6 else "anonymous"
    return dict(resident)


def row(samples: list[Sample], rank: int) -> str:
    """The last sample as a row of a table."""
    last, grown = samples[-1], ""
    if len(samples) > SAMPLES // 2:
        half = samples[SAMPLES // 2 - 1]
        growth = {name: size - half.mappings.get(name, 0) for name, size in last.mappings.items()}
        name = max(growth, key=lambda name: growth[name])
        grown = f"{name} +{growth[name] / 1e6:.2f}" * (growth[name] > 0)
    counts = f"{last.descriptors} | {last.threads} | {1000 * last.seconds:.2f}"
    return f"| {rank} | {last.step} | {last.resident / 1e6:.2f} | {grown} | {counts} |"


def faults_of(samples: list[Sample], limit_mb: float, limit_percent: float) -> list[str]:
    """What grew or changed in the last half, in words."""
    half, last = samples[SAMPLES // 2 - 1], samples[-1]
    where = f"between steps {half.step} and {last.step}"
    faults = []
    grown_mb = (last.resident - half.resident) / 1e6
    if grown_mb > limit_mb:
        faults.append(f"resident memory grew by {grown_mb:.2f} MB {where}")
    quarters = samples[SAMPLES // 2 : -SAMPLES // 4], samples[-SAMPLES // 4 :]
    # The fewest of a quarter: a file that another thread has open for a moment is no leak.
    opened, still_open = (min(each.descriptors for each in quarter) for quarter in quarters)
    if still_open != opened:
        faults.append(f"{opened} and then {still_open} descriptors {where}")
    if last.threads > half.threads:
        faults.append(f"{half.threads} threads after step {half.step}, {last.threads} after step {last.step}")
    before, after = (1000 * median(each.seconds for each in quarter) for quarter in quarters)
    if after > before * (1 + limit_percent / 100):
        faults.append(f"a step took {before:.3f} ms and then {after:.3f} ms, {where}: +{after / before - 1:.1%}")
    return faults


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="auto", help="auto (default), mpi, torch or horovod")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--compression", choices=COMPRESSIONS, default="nominate")
    parser.add_argument("--limit-mb", type=float, default=1.0, help="of growth in the last half; default: 1")
    parser.add_argument("--limit-percent", type=float, default=5.0, help="of slower steps there; default: 5")
    parser.add_argument("--trace", action="store_true", help="name the lines of Python whose memory grew")
    arguments = parser.parse_args()
    if arguments.steps < SAMPLES:
        parser.error(f"--steps must be at least {SAMPLES}, got {arguments.steps}")
    return arguments


if __name__ == "__main__":
    main()
