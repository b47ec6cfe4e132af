"""Runs and their results: one JSON line each, appended when the run ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.figures import Floats, Record
from hvd_sketch.files import append_lines


@dataclass(frozen=True)
class Group:
    """Runs that differ in their learning rate and seed alone: of them the best rate is looked for.

    Attributes:
        task, method: names of :data:`.tasks.TASKS` and :data:`.methods.METHODS`.
        workers: ranks.
        skewed: each worker has two or three classes only.
        steps: of the training.
        ratio: bytes of a dense ring allreduce over those wanted, of the matrices; 1 for the dense exchange.
    """

    task: str
    workers: int
    skewed: bool
    steps: int
    method: str
    ratio: float


@dataclass(frozen=True)
class Run:
    """One training: its group, the peak of its learning rate, and the seed of weights and data."""

    group: Group
    rate: float
    seed: int

    @property
    def labels(self) -> Record:
        """As a record has them."""
        return {**asdict(self.group), "rate": self.rate, "seed": self.seed}

    @property
    def title(self) -> str:
        """For a line of progress."""
        group = self.group
        skewed = " skewed" if group.skewed else ""
        where = f"{group.task} W={group.workers}{skewed} {group.steps} steps {group.ratio:g}x"
        return f"{where} {group.method} rate {self.rate:g} seed {self.seed}"


def run_of(record: Record) -> Run:
    """The run that a record is of."""
    group = Group(**{field.name: record[field.name] for field in fields(Group)})
    return Run(group, record["rate"], record["seed"])


def results_of(runs: Iterable[Record]) -> Floats:
    """Accuracy in per cent, or loss, of those that have not diverged."""
    values = [run["acc"] if run["acc"] is not None else run["loss"] for run in runs if not run["diverged"]]
    return np.array(values, dtype=np.float64)


def mean(runs: Iterable[Record], name: str) -> float | None:
    """Of a figure, over the runs that have it; None: none has."""
    values = [run[name] for run in runs if run[name] is not None]
    return float(np.mean(values)) if values else None


def read(path: Path) -> dict[Run, Record]:
    """All finished runs of a file, none where there is no file; a line cut short by a crash is left out."""
    records: dict[Run, Record] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[run_of(record)] = record
    return records


def append(path: Path, records: Iterable[Record]) -> None:
    """Write finished runs to the end of a file, so that they survive a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, map(json.dumps, records))
