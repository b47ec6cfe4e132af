"""Logs of ranks, read back and put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_sketch.logs.line_file import KEPT
from hvd_sketch.report.log_lines import Lines, read_lines

STARTED_WITHIN_S = 600.0  # ranks of a run, by the clocks of their hosts
OF_RANK = {"rank", "started", "hvd_sketch", "torch"}  # entries of a first line that ranks may have each for themselves
logger = logging.getLogger(__name__)

Numbers = NDArray[np.float64]


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
    """One run. There are ``n`` lines of one or more steps, rank 0's, and ``r`` ranks that exchange with each other.

    With ``levels=2`` these are the hosts' leaders. The lines of other ranks tell of their values alone.

    Attributes:
        name: for the page.
        about: what the log says of the run as a whole.
        found: how many logs of ranks were found.
        longest_log: steps that the longest of them tells of; more than rank 0's where lines of rank 0 are missing.
        ranks: those that exchange, ascending.
        step: [n], number of the last step of each line.
        steps: [n], how many steps the line tells of.
        time_s: [n], of training at its end, without the time between an end and a new start.
        step_s, exchange_s: [r, n], sums over its steps; NaN where a rank has no such line.
        longest_s: [n], of its longest step on any rank.
        sent_bytes: [n] by phase, the mean over ranks.
        collective_s: [r, n] by phase, in collectives; NaN as above.
        dense_bytes: [n], what a dense exchange would have sent.
        skipped: [n], steps.
        values: what the user logged, by name.
        residual_norm, captured: see :class:`~hvd_sketch.logs.step_observer.Step`.
    """

    name: str
    about: Mapping[str, Any]
    found: int
    longest_log: int
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
        return self.found == self.about["size"]

    @property
    def in_all_logs(self) -> NDArray[np.bool_]:
        """bool [n], whether all ranks have the line."""
        return np.all(np.isfinite(self.step_s), axis=0)

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
            network += np.nanmin(seconds, 0)
        return {**parts, "network": network, "waiting for the slowest": np.maximum(inside - network, 0)}


def read_run(path: Path, name: str) -> Run:
    """A run from rank 0's log, and those of the other ranks beside it.

    Of a run that went on from a checkpoint, what was trained again counts as the last time.

    Raises:
        ValueError: the file is no log, or is that of another rank, or has no step; a line is not as it was written.
    """
    logs = logs_of(path)
    about, own = read_lines(path)
    if about.get("rank", 0):
        raise ValueError(f"{path} is the log of rank {about['rank']}: give that of rank 0, beside which it is found")
    if not own:
        raise ValueError(f"{path} has no step: expected a log of DistributedOptimizer")
    others = {rank: _lines_of_other(logs[rank], about) for rank in sorted(logs) if 0 < rank < about["size"]}
    return _put_together(name, about, {0: own} | {rank: lines for rank, lines in others.items() if lines})


def _lines_of_other(path: Path, of_first: Mapping[str, Any]) -> Lines:
    """The lines of another rank's log; none where it is of another run, or cannot be read, which is told."""
    try:
        about, lines = read_lines(path)
    except (OSError, ValueError) as error:
        logger.warning("a log of another rank is left out: %s", error)
        return {}
    return lines if lines and _is_of_run(path, about, of_first) else {}


def logs_of(path: Path) -> dict[int, Path]:
    """By rank the logs of a run: rank 0's, and those beside it."""
    return {0: path} | {rank: other for other in path.parent.iterdir() if (rank := _rank_of(other, path)) is not None}


def _is_of_run(path: Path, about: Mapping[str, Any], of_first: Mapping[str, Any]) -> bool:
    """Whether another rank's log is of the same run as rank 0's, and not left there by one before; tells where not."""
    names = (about.keys() | of_first.keys()) - OF_RANK
    differ = sorted(name for name in names if about.get(name) != of_first.get(name))
    if abs(about.get("started", 0) - of_first.get("started", 0)) > STARTED_WITHIN_S:
        differ.append("started")
    if differ:
        logger.warning(
            "%s is left out: it is of another run than rank 0's log, whose first line differs in %s. Delete it, or "
            "copy the log of this run from its host.",
            *(path, ", ".join(differ)),
        )
    return not differ


def _rank_of(other: Path, path: Path) -> int | None:
    """The rank whose log ``other`` is, where ``path`` is that of rank 0; None: of no other rank of this run."""
    if other.suffix != path.suffix:
        return None
    number = other.stem.removeprefix(f"{path.stem}.rank")
    if number != other.stem and number.isdecimal():
        return int(number)
    # The log of a run before: run.jsonl.old, and run.rank1.jsonl.old.
    return _rank_of(other.with_suffix(""), path.with_suffix("")) if path.suffix == KEPT else None


def _put_together(name: str, about: Mapping[str, Any], logs: Mapping[int, Lines]) -> Run:
    """A run from the logs of its ranks."""
    every = [[lines.get(number) for number in logs[0]] for lines in logs.values()]  # [ranks, n], of rank 0's steps
    # With levels=2 only leaders have phases: the others wait inside of their hosts, of which logs do not tell.
    exchanging = {rank: lines for rank, lines in zip(logs, every, strict=True) if rank == 0 or _has_phases(lines)}
    own = exchanging.values()

    def of_ranks(key: str) -> Numbers:
        return _numbers([[line and line[key] for line in lines] for lines in own])

    def of_phase(phase: str, entry: int) -> Numbers:
        nothing = (0, 0.0)
        return _numbers([[line and line["phases"].get(phase, nothing)[entry] for line in lines] for lines in own])

    def series(of_line: Callable[[dict[str, Any]], float | None]) -> Series:
        return _series([[line and of_line(line) for line in lines] for lines in every])

    lines_of_all = [line for lines in every for line in lines if line]
    phases = dict.fromkeys(phase for line in lines_of_all for phase in line["phases"])
    names = dict.fromkeys(name for line in lines_of_all for name in line["values"])
    return Run(
        name=name,
        about=about,
        found=len(logs),
        longest_log=max(sum(line["steps"] for line in lines.values()) for lines in logs.values()),
        ranks=list(exchanging),
        step=of_ranks("step")[0],
        steps=of_ranks("steps")[0],
        time_s=of_ranks("time_s")[0],
        step_s=of_ranks("step_s"),
        exchange_s=of_ranks("exchange_s"),
        longest_s=np.nanmax(of_ranks("longest_s"), 0),
        sent_bytes={phase: np.nanmean(of_phase(phase, 0), 0) for phase in phases},
        collective_s={phase: of_phase(phase, 1) for phase in phases},
        dense_bytes=np.nanmean(of_ranks("dense_bytes"), 0),
        skipped=of_ranks("skipped")[0],
        values={name: series(partial(_value, name)) for name in names},
        residual_norm=series(lambda line: line.get("residual_norm")),
        captured=series(lambda line: line.get("captured")),
    )


def _value(name: str, line: dict[str, Any]) -> float | None:
    value: float | None = line["values"].get(name)
    return value


def _has_phases(lines: list[dict[str, Any] | None]) -> bool:
    return any(line is not None and line["phases"] for line in lines)


def _numbers(given: list[list[Any]]) -> Numbers:
    """Numbers of ranks and lines, NaN in place of None."""
    return np.array([[np.nan if value is None else value for value in values] for values in given], dtype=np.float64)


def _series(given: list[list[Any]]) -> Series:
    """Numbers of ranks and lines, None where there is none."""
    numbers = _numbers(given)
    counts = np.isfinite(numbers).sum(0)
    at = np.flatnonzero(counts)
    return Series(at, np.nansum(numbers[:, at] / counts[at], 0))  # a sum of large numbers is not finite
