"""The tables of a report: what runs have come to, and how they were configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_sketch.commands.plan import told_bytes, told_seconds
from hvd_sketch.report.runs import Run

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A row's heading, and a text for each run.

    Attributes:
        title: above it.
        rows: heading and texts.
        marks: whether rows are marked in which the runs differ.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[str]]]
    marks: bool = False


def summary(runs: Sequence[Run]) -> Table:
    """Of each run as a whole."""
    told = [_sums(run) for run in runs]
    names = dict.fromkeys(name for each in told for name in each)
    return Table("Summary", [(name, [each.get(name, NONE) for each in told]) for name in names])


def configuration(runs: Sequence[Run]) -> Table:
    """What each log says of its run."""
    left_out = ("run", "rank", "started")
    told = [_flat({name: value for name, value in run.about.items() if name not in left_out}) for run in runs]
    names = dict.fromkeys(name for each in told for name in each)
    return Table("Configuration", [(name, [each.get(name, NONE) for each in told]) for name in names], marks=True)


def _sums(run: Run) -> dict[str, str]:
    steps, sent, dense = run.steps.sum(), run.sent_so_far[-1], run.dense_bytes.sum()
    found = {
        "ranks": f"{run.about['size']}" + ("" if run.has_all_ranks else f", logs of {run.found}"),
        "steps": f"{steps:.0f}" + _missing(run),
        "skipped steps": f"{run.skipped.sum():.0f}",
        "time of training": told_seconds(run.time_s[-1]),
        "time of a step": told_seconds(np.nanmean(run.step_s, 0).sum() / steps),
        "longest step": told_seconds(run.longest_s.max()),
        "bytes of a step, sent": told_bytes(sent / steps),
        "bytes sent by a rank": told_bytes(sent),
        "bytes received by a rank": told_bytes(sent),
        "a dense exchange sends": told_bytes(dense),
        "times fewer bytes": f"{dense / sent:.1f}" if sent else NONE,
    }
    for name, seconds in run.parts_s.items():
        found[f"of a step: {name}"] = f"{np.nansum(seconds) / np.nansum(run.step_s):.1%}"
    for name, series in run.values.items():
        if len(series.at):
            found[f"{name}, last"] = f"{np.mean(series.values[-_last(len(series.values)) :]):.3g}"
    return found


def _missing(run: Run) -> str:
    """What to say where lines of some rank are missing."""
    steps, in_all = run.steps.sum(), run.steps[run.in_all_logs].sum()
    told = f", {in_all:.0f} of them in the logs of all ranks" if in_all < steps else ""
    return told + (f"; rank 0's log lacks {run.longest_log - steps:.0f} more" if run.longest_log > steps else "")


def _last(count: int) -> int:
    """How many of a series' last numbers tell its end: single losses are noisy."""
    return max(count // 50, 1)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested values by name, as texts."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}: ")
        else:
            found[before + name] = NONE if value is None else str(value)
    return found
