"""Does the runs of some groups in several processes, each run once, until all are done or the time is up."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.accuracy_per_byte import records
from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.accuracy_per_byte.search import wanted
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.accuracy_per_byte.training import LONG_TRIAL, train
from benchmarks.machine import commit
from benchmarks.paper.rate_search import rounded

Train = Callable[[Run, Path, float | None], Record]


def next_run(
    groups: Sequence[Group], seeds: int, done: dict[Run, Record], taken: set[Run], finer: bool = False
) -> Run | None:
    """The first run of the first group that has one to do; None where all wait for runs under way."""
    for group in groups:
        centre = METHODS[group.method].first_rate(TASKS[group.task], group.steps)
        for run in wanted(group, centre, seeds, done, finer):
            if run not in taken:
                return run
    return None


def run_all(
    groups: Sequence[Group],
    seeds: int,
    data_dir: Path,
    path: Path,
    *,
    finer: bool = False,
    processes: int = 2,
    minutes: float | None = None,
    tell: Callable[[str], None] = print,
    train: Train = train,
) -> None:
    """Do what is not in the file yet.

    Args:
        groups: most important first.
        seeds: runs of each group at its best rate.
        data_dir: the folder of all data sets.
        path: of the records; finished runs are appended, with the commit at the start.
        finer: also rates on either side of the best of the grid, the root of its factor away.
        processes: that train at the same time, with one thread each.
        minutes: after which no run is started; None: never.
        tell: gets a line for every finished run.
        train: makes a record of a run; raises ValueError where there is no such run.
    """
    done, taken, version = records.read(path), set[Run](), commit()
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    under_way: dict[Future[Record], Run] = {}
    with _pool(processes) as pool:
        while True:
            while len(under_way) < processes and time.monotonic() < deadline:
                run = next_run(groups, seeds, done, taken, finer)
                if run is None:
                    break
                taken.add(run)
                under_way[pool.submit(train, run, data_dir, known_ratio(run, done))] = run
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                if isinstance(error := future.exception(), ValueError):
                    tell(f"{run.title}: {error}")  # a ratio that the method cannot meet: other groups go on
                    continue
                done[run] = {**future.result(), "commit": version, "recorded": time.strftime("%Y-%m-%d")}
                records.append(path, [done[run]])
                tell(_told(run, done[run]))


def known_ratio(run: Run, done: dict[Run, Record]) -> float | None:
    """The nominal ratio that a trial found for the group; from its first whole run on, set right by the bytes of that.

    Ranks name the same coordinates more often in a run's beginning than later, and the trial sees no more than that.
    """
    first = next((record for other, record in done.items() if other.group == run.group), None)
    if first is None or first["diverged"] or METHODS[run.group.method].trial < LONG_TRIAL:
        return first and first["nominal_ratio"]
    return rounded(first["nominal_ratio"] * run.group.ratio / first["matrix_ratio"])


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with one thread each. They take the environment when they start, before they import torch and Numba."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _told(run: Run, record: Record) -> str:
    if record["diverged"]:
        reached = "diverged"
    else:
        reached = f"loss {record['loss']:.4f}" if record["acc"] is None else f"accuracy {record['acc']:.2f} %"
    ratio = "" if record["matrix_ratio"] is None else f", {record['matrix_ratio']:.1f}x"
    return f"{run.title}: {reached}{ratio}, {record['seconds']:.1f} s ({record['gradient_s']:.1f} in the model)"
