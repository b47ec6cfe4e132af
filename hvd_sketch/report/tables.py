"""The tables of a report: what runs have come to, and how they were configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_sketch.logs.run_log import number
from hvd_sketch.report.runs import Run, Series
from hvd_sketch.units import told_bytes, told_seconds

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


def figures(run: Run) -> dict[str, Any]:
    """What a run has come to, in numbers, for JSON. Bytes are those of a rank, which receives as many as it sends."""
    steps, sent, dense = run.steps.sum(), run.sent_so_far[-1], run.dense_bytes.sum()
    total_s = np.nansum(run.step_s)
    return {
        "name": run.name,
        "ranks": run.about["size"],
        "logs": run.found,
        "steps": round(steps),
        "skipped_steps": round(run.skipped.sum()),
        "training_s": number(run.time_s[-1]),
        "step_s": number(np.nanmean(run.step_s, 0).sum() / steps),
        "longest_step_s": number(run.longest_s.max()),
        "sent_bytes": round(sent),
        "dense_bytes": round(dense),
        "ratio": number(dense / sent) if sent else None,
        "shares_of_a_step": {
            name: number(np.nansum(seconds) / total_s) if total_s else None for name, seconds in run.parts_s.items()
        },
        "last_values": {name: _last(series) for name, series in run.values.items() if len(series.at)},
    }


def configuration(runs: Sequence[Run]) -> Table:
    """What each log says of its run."""
    left_out = ("run", "rank", "started")
    told = [_flat({name: value for name, value in run.about.items() if name not in left_out}) for run in runs]
    names = dict.fromkeys(name for each in told for name in each)
    return Table("Configuration", [(name, [each.get(name, NONE) for each in told]) for name in names], marks=True)


def _sums(run: Run) -> dict[str, str]:
    of = figures(run)
    found = {
        "ranks": f"{of['ranks']}" + ("" if run.has_all_ranks else f", logs of {run.found}"),
        "steps": f"{of['steps']}" + _about_steps(run),
        "skipped steps": f"{of['skipped_steps']}",
        "time of training": _told(of["training_s"], told_seconds),
        "time of a step": _told(of["step_s"], told_seconds),
        "longest step": _told(of["longest_step_s"], told_seconds),
        "bytes of a step, sent": told_bytes(of["sent_bytes"] / of["steps"]),
        "bytes sent by a rank": told_bytes(of["sent_bytes"]),
        "bytes received by a rank": told_bytes(of["sent_bytes"]),
        "a dense exchange sends": told_bytes(of["dense_bytes"]),
        "times fewer bytes": _told(of["ratio"], "{:.1f}".format),
    }
    found |= {f"of a step: {name}": _told(share, "{:.1%}".format) for name, share in of["shares_of_a_step"].items()}
    return found | {f"{name}, last": _told(value, "{:.3g}".format) for name, value in of["last_values"].items()}


def _told(value: float | None, tell: Callable[[float], str]) -> str:
    return NONE if value is None else tell(value)


def _about_steps(run: Run) -> str:
    """What to say of the number of steps: what a step is, and where lines of some rank are missing."""
    steps, in_all = run.steps.sum(), run.steps[run.in_all_logs].sum()
    told = f", exchanges after {every} steps of a rank" if (every := run.about.get("every")) else ""
    told += f", {in_all:.0f} of them in the logs of all ranks" if in_all < steps else ""
    return told + (f"; rank 0's log lacks {run.longest_log - steps:.0f} more" if run.longest_log > steps else "")


def _last(series: Series) -> float | None:
    """The mean of the last 50th of a series: single losses are noisy."""
    last = series.values[-max(len(series.values) // 50, 1) :]
    return number(float(np.sum(last / len(last))))  # a sum of large numbers is not finite


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested values by name, as texts."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}: ")
        else:
            found[before + name] = NONE if value is None else str(value)
    return found
