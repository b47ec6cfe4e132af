"""Logs of ranks, read back and put together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_sketch.logs.run_log import FORMAT

Numbers = NDArray[np.float64]
Lines = dict[int, dict[str, Any]]  # by the number of their last step, ascending


@dataclass(frozen=True)
class Series:
    """Numbers that not every line has.

    Attributes:
        at: int64 [n], the lines that have one, ascending.
        values: float64 [n], the mean over the ranks that have one; finite.
    """

    at: NDArray[np.int64]
    values: Numbers


@dataclass(frozen=True)
class Run:
    """One run. There are ``n`` lines of one or more steps, and ``r`` ranks whose logs were found.

    Attributes:
        name: for the page.
        about: what the log says of the run as a whole.
        ranks: those that were found, ascending.
        step: [n], number of the last step of each line.
        steps: [n], how many steps the line tells of.
        time_s: [n], of training at its end, without the time between an end and a new start.
        step_s, exchange_s: [r, n], sums over its steps.
        longest_s: [n], of its longest step on any rank.
        sent_bytes: [n] by phase, the mean over ranks.
        collective_s: [r, n] by phase, in collectives.
        dense_bytes: [n], what a dense exchange would have sent.
        skipped: [n], steps.
        values: what the user logged, by name.
        residual_norm, captured: see :class:`~hvd_sketch.logs.step_observer.Step`.
    """

    name: str
    about: Mapping[str, Any]
    ranks: Sequence[int]
    step: Numbers
    steps: Numbers
    time_s: Numbers
    step_s: Numbers
    exchange_s: Numbers
    longest_s: Numbers
    sent_bytes: Mapping[str, Numbers]
    collective_s: Mapping[str, Numbers]
    dense_bytes: Numbers
    skipped: Numbers
    values: Mapping[str, Series]
    residual_norm: Series
    captured: Series

    @property
    def has_all_ranks(self) -> bool:
        """Whether waiting can be told from the network."""
        return len(self.ranks) == self.about["size"]

    @cached_property
    def sent_so_far(self) -> Numbers:
        """[n], bytes of a rank at the end of each line."""
        return np.cumsum(sum(self.sent_bytes.values(), np.zeros(len(self.step))))

    @cached_property
    def parts_s(self) -> dict[str, Numbers]:
        """What the time of a step goes into, [r, n] each, sums over the steps of a line.

        The rank that comes last to a collective waits for nobody: its time in there is the network's, and what the
        others spend above that is waiting.
        """
        inside = sum(self.collective_s.values(), np.zeros_like(self.step_s))
        parts = {
            "forward, backward, data": self.step_s - self.exchange_s,
            "compression": np.maximum(self.exchange_s - inside, 0),
        }
        if not self.has_all_ranks:
            return {**parts, "network and waiting": inside}
        network = np.zeros_like(self.step_s)
        for seconds in self.collective_s.values():
            network += seconds.min(0)
        return {**parts, "network": network, "waiting for the slowest": np.maximum(inside - network, 0)}


def read_run(path: Path, name: str) -> Run:
    """A run from rank 0's log, and those of the other ranks beside it.

    Of a run that went on from a checkpoint, what was trained again counts as the last time.

    Raises:
        ValueError: the file is no log, or has no step.
    """
    logs = {0: path} | {rank: other for other in path.parent.iterdir() if (rank := _rank_of(other, path)) is not None}
    read = {rank: _read_lines(logs[rank]) for rank in sorted(logs)}
    about = read[0][0]
    ranks = [rank for rank in read if rank < about["size"] and read[rank][1]]
    every = [read[rank][1] for rank in ranks]
    common = [number for number in every[0] if all(number in lines for lines in every)] if every else []
    if not common:
        raise ValueError(f"{path} has no step that is in the logs of all ranks: expected a log of DistributedOptimizer")
    return _put_together(name, about, ranks, [[lines[number] for number in common] for lines in every])


def _rank_of(other: Path, path: Path) -> int | None:
    """The rank whose log ``other`` is, where ``path`` is that of rank 0; None: of no other rank of this run."""
    start = f"{path.stem}.rank"
    if other.suffix != path.suffix or not other.stem.startswith(start):
        return None
    number = other.stem.removeprefix(start)
    return int(number) if number.isdecimal() else None


def _read_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """What a log says of the run, and its lines."""
    about: dict[str, Any] = {}
    lines: Lines = {}
    before_s = 0.0  # of training, before the last start
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if "run" in record:
            about, before_s = record, max((line["time_s"] for line in lines.values()), default=0.0)
        elif "step" in record:
            while lines and next(reversed(lines)) > record["step"] - record["steps"]:
                lines.popitem()
            lines[record["step"]] = {**record, "time_s": before_s + record["time_s"]}
        elif lines:
            last = lines[next(reversed(lines))]
            last["values"] = {**last["values"], **record.get("values", {})}
    if about.get("run") != FORMAT:
        raise ValueError(
            f"{path} is no log of this version: expected a file that DistributedOptimizer(log=…) wrote, of format "
            f"{FORMAT}, found {about.get('run', 'another')}"
        )
    return about, lines


def _put_together(name: str, about: Mapping[str, Any], ranks: list[int], every: list[list[dict[str, Any]]]) -> Run:
    """A run from the lines of its ranks, as many of each."""

    def of_ranks(key: str) -> Numbers:
        return np.array([[line[key] for line in lines] for lines in every], dtype=np.float64)

    def of_phase(phase: str, entry: int) -> Numbers:
        nothing = (0, 0.0)
        return np.array([[line["phases"].get(phase, nothing)[entry] for line in lines] for lines in every], np.float64)

    phases = dict.fromkeys(phase for lines in every for line in lines for phase in line["phases"])
    names = dict.fromkeys(name for lines in every for line in lines for name in line["values"])
    return Run(
        name=name,
        about=about,
        ranks=ranks,
        step=of_ranks("step")[0],
        steps=of_ranks("steps")[0],
        time_s=of_ranks("time_s")[0],
        step_s=of_ranks("step_s"),
        exchange_s=of_ranks("exchange_s"),
        longest_s=of_ranks("longest_s").max(0),
        sent_bytes={phase: of_phase(phase, 0).mean(0) for phase in phases},
        collective_s={phase: of_phase(phase, 1) for phase in phases},
        dense_bytes=of_ranks("dense_bytes").mean(0),
        skipped=of_ranks("skipped")[0],
        values={name: _series([[line["values"].get(name) for line in lines] for lines in every]) for name in names},
        residual_norm=_series([[line.get("residual_norm") for line in lines] for lines in every]),
        captured=_series([[line.get("captured") for line in lines] for lines in every]),
    )


def _series(given: list[list[float | None]]) -> Series:
    """Numbers of ranks and lines, None where there is none."""
    numbers = np.array([[np.nan if value is None else value for value in values] for values in given])
    counts = np.isfinite(numbers).sum(0)
    at = np.flatnonzero(counts)
    return Series(at, np.nansum(numbers[:, at], 0) / counts[at])
