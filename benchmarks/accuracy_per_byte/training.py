"""One run, from its start to its record."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.accuracy_per_byte.rounds import RoundsTraining
from benchmarks.accuracy_per_byte.steps import Training
from benchmarks.accuracy_per_byte.tasks import BASE_WORKERS, TASKS, load
from benchmarks.paper.rate_search import rounded

LONG_TRIAL = 0.1  # of a run: shorter ones are of methods whose bytes are the same in every step
MOST_TRIALS = 3  # short ones, each set right by the one before
CLOSE_ENOUGH = 0.01  # of the ratio: a trial that has met it so well is the last


def begin(run: Run, data_dir: Path, nominal_ratio: float | None = None) -> Training:
    """What a run begins as; arguments as for :func:`train`."""
    task = TASKS[run.group.task]
    start = weights_of(task.begins_with, data_dir) if task.begins_with else None
    kind = RoundsTraining if METHODS[run.group.method].every > 1 else Training
    return kind(run, load(run.group.task, data_dir), nominal_ratio, start)


@lru_cache(maxsize=1)
def weights_of(task: str, data_dir: Path) -> dict[str, Tensor]:
    """Of a task's model after a dense training at its first rate, of seed 0; once per process."""
    group = Group(task, BASE_WORKERS, False, TASKS[task].steps, "dense", 1.0)
    training = begin(Run(group, METHODS["dense"].first_rate(TASKS[task], group.steps), 0), data_dir)
    while training.done < group.steps:
        assert training.step(), "the first rate of a task does not diverge"
    return training.model.state_dict()


def train(run: Run, data_dir: Path, nominal_ratio: float | None = None) -> Record:
    """Train to the end or until it diverges; returns the record, without the commit.

    Args:
        run: what to train.
        data_dir: the folder of all data sets.
        nominal_ratio: of an earlier run of the group, to save the trial; see :func:`find_nominal_ratio`.
    """
    started = time.perf_counter()
    data = load(run.group.task, data_dir)
    nominal = nominal_ratio or find_nominal_ratio(run.group, data_dir)
    training = begin(run, data_dir, nominal)
    loaded = time.perf_counter()
    diverged = False
    while training.done < run.group.steps and not diverged:
        diverged = not training.step()
    training.finish()
    trained_s = time.perf_counter() - loaded
    acc, loss = data.evaluate(training.model)
    diverged = diverged or not math.isfinite(loss)
    figures = {"acc": None if diverged or acc is None else round(acc, 3), "loss": None if diverged else round(loss, 5)}
    times = {"setup_s": loaded - started, "seconds": trained_s, "gradient_s": training.gradient_s}
    return {
        **run.labels,
        **figures,
        "diverged": diverged,
        **_traffic(training),
        "nominal_ratio": nominal,
        **{name: round(value, 2) for name, value in times.items()},
    }


def _traffic(training: Training) -> Record:
    """Measured bytes; None for a method that exists in a simulation only, or before the first step."""
    if not METHODS[training.run.group.method].is_sent or not training.done:
        return {"matrix_ratio": None, "compression_ratio": None, "wire_bytes_per_step": None}
    ledger = training.ledger
    return {
        "matrix_ratio": round(training.matrix_ratio(), 2),
        "compression_ratio": round(ledger.compression_ratio(), 2),
        "wire_bytes_per_step": round(ledger.totals().wire_bytes / training.done, 1),
    }


def find_nominal_ratio(group: Group, data_dir: Path) -> float:
    """What to ask of a method's settings so that the measured ratio is the group's.

    Where the settings alone do not say, the bytes are measured in a trial: the first steps of the run of seed 0, at the
    rate in the middle of the first grid. It is set right a few times, because some bytes are the same at any ratio.
    """
    method, nominal = METHODS[group.method], group.ratio
    if not method.trial:
        return nominal
    if method.grows:
        group = replace(group, workers=BASE_WORKERS)
    run = Run(group, method.first_rate(TASKS[group.task], group.steps), 0)
    rounds = max(int(group.steps * method.trial) // method.every, 1)
    for _ in range(MOST_TRIALS if method.trial < LONG_TRIAL else 1):
        trial = begin(run, data_dir, nominal)
        while trial.done < rounds * method.every and trial.step():
            pass
        nominal = rounded(nominal * group.ratio / trial.matrix_ratio())
        if abs(trial.matrix_ratio() / group.ratio - 1) < CLOSE_ENOUGH:
            break
    return nominal
