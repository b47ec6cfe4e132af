"""The log of a run: a line of JSON for every step, fewer of them in long runs. ``hvd-sketch report`` shows it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from hvd_sketch.logs.line_file import LineFile, path_of_rank
from hvd_sketch.logs.step_observer import Output, Step

FORMAT = 1
SINGLE_STEPS = 10_000  # that have a line each; then lines of 2, from twice as many steps on of 4, and so on


def steps_of_line(step: int) -> int:
    """How many steps the line that ``step`` is in tells of."""
    return 1 << (step // SINGLE_STEPS).bit_length()


class RunLog(Output):
    """One rank's log, as an output of :class:`~hvd_sketch.logs.step_observer.StepObserver`.

    The first line describes the run. Each other line tells of one step, or of the sums over several: see
    docs/report.md for its entries. A run of a million steps has 45,000 lines.

    Args:
        path: of rank 0's; see :func:`~hvd_sketch.logs.line_file.path_of_rank`.
        rank: this one.
        about: what describes the run, by name.
    """

    def __init__(self, path: str | PathLike[str], rank: int, about: Mapping[str, Any]) -> None:
        self._path = path_of_rank(path, rank)
        self._file: LineFile | None = None
        self._about = {"run": FORMAT, "started": time.time(), **about}
        self._line = _Line()

    def step(self, step: Step) -> None:
        if self._file is None:
            self._file = LineFile(self._path, goes_on=step.number > 0)
            self._file.write(json.dumps(self._about, default=str))
        self._line.add(step)
        if (step.number + 1) % steps_of_line(step.number) == 0:
            self._end_line()

    def close(self, last: Mapping[str, float]) -> None:
        if self._file is None:
            return
        if self._line.steps:
            self._end_line()
        if last:
            self._file.write(json.dumps({"values": _as_json(last)}))
        self._file.close()

    def _end_line(self) -> None:
        assert self._file is not None
        self._file.write(json.dumps(self._line.as_record(), separators=(",", ":")))
        self._line = _Line()


class _Line:
    """The sums over the steps of a line."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    @property
    def steps(self) -> int:
        return len(self._steps)

    def add(self, step: Step) -> None:
        self._steps.append(step)

    def as_record(self) -> dict[str, Any]:
        """For JSON. Times are in seconds, and are not written finer than a microsecond."""
        steps, last = self._steps, self._steps[-1]
        phases = {
            phase: [
                sum(step.sent_bytes.get(phase, 0) for step in steps),
                round(sum(step.collective_s.get(phase, 0.0) for step in steps), 6),
            ]
            for phase in last.sent_bytes
        }
        record = {
            "step": last.number,
            "steps": len(steps),
            "time_s": round(last.end_s, 6),
            "step_s": round(sum(step.step_s for step in steps), 6),
            "longest_s": round(max(step.step_s for step in steps), 6),
            "exchange_s": round(sum(step.exchange_s for step in steps), 6),
            "phases": phases,
            "dense_bytes": sum(step.dense_bytes for step in steps),
            "skipped": sum(step.is_skipped for step in steps),
            "values": _as_json(_means(step.values for step in steps)),
        }
        measured = [step for step in steps if step.residual_norm is not None]
        if measured:
            record["residual_norm"] = _number(measured[-1].residual_norm)
            record["captured"] = _number(measured[-1].captured)
        return record


def _means(given: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, over those that have it."""
    found: dict[str, list[float]] = {}
    for values in given:
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _as_json(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float | None) -> float | None:
    """Six digits; None where there is no number: JSON has no NaN."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
