"""The log of a run: a line of JSON for every step, fewer of them in long runs. ``hvd-sketch report`` shows it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from hvd_sketch.logs.line_file import LineFile, path_of_rank
from hvd_sketch.logs.step_observer import Output, Step

FORMAT = 1
ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps makes an encoder each time
SINGLE_STEPS = 10_000  # that have a line each; then lines of 2, from twice as many steps on of 4, and so on


def steps_of_line(step: int) -> int:
    """How many steps the line that ``step`` is in tells of."""
    return 1 << (step // SINGLE_STEPS).bit_length()


class RunLog(Output):
    """One rank's log, as an output of :class:`~hvd_sketch.logs.step_observer.StepObserver`.

    The first line describes the run. Each other line tells of one step, or of the sums over several: see
    docs/report.md for its entries. A run of a million steps has 42,813 lines.

    Args:
        path: of rank 0's; see :func:`~hvd_sketch.logs.line_file.path_of_rank`.
        rank: this one.
        about: what describes the run, by name.
    """

    def __init__(self, path: str | PathLike[str], rank: int, about: Mapping[str, Any]) -> None:
        self._path = path_of_rank(path, rank)
        self._file: LineFile | None = None
        self._begin = [json.dumps({"run": FORMAT, "started": time.time(), **about}, default=str)]  # until it is written
        self._start_s = 0.0  # of the first step
        self._line = _Line(0.0)
        self._rest: dict[str, float] = {}  # after the last step

    def interrupt(self, step_s: float, dense_bytes: int) -> None:
        self._rest = {"step_s": round(step_s, 6), "dense_bytes": dense_bytes}

    def write(self, steps: Sequence[Step]) -> None:
        lines = []
        if self._file is None:
            self._file = LineFile(self._path, goes_on=steps[0].number > 0)
            self._start_s = steps[0].end_s - steps[0].step_s
            self._line = _Line(self._start_s)
        for step in steps:
            self._line.add(step)
            if (step.number + 1) % steps_of_line(step.number) == 0:
                lines.append(self._end_line())
        self._append(lines)

    def close(self, last: Mapping[str, float]) -> None:
        if self._file is None:
            return
        lines = [self._end_line()] if self._line.steps else []
        if last or self._rest:
            lines.append(json.dumps({"values": as_json(last), **self._rest}))
        self._rest = {}
        self._append(lines)
        self._file.close()

    def _append(self, lines: Sequence[str]) -> None:
        """Write lines, after the first one, without which they could not be read."""
        if self._file is not None and self._file.write([*self._begin, *lines]):
            self._begin = []

    def _end_line(self) -> str:
        line, self._line = self._line, _Line(self._start_s)
        return ENCODE(line.as_record())


class _Line:
    """The sums over the steps of a line, of a run that began at ``start_s``."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self.steps = self._dense_bytes = self._skipped = 0
        self._step_s = self._longest_s = self._exchange_s = 0.0
        self._phases: dict[str, tuple[int, float]] = {}
        self._values: dict[str, list[float]] = {}
        self._measured: dict[str, float | None] = {}

    def add(self, step: Step) -> None:
        self.steps += 1
        self._last = step
        self._dense_bytes += step.dense_bytes
        self._skipped += step.is_skipped
        self._step_s += step.step_s
        self._longest_s = max(self._longest_s, step.step_s)
        self._exchange_s += step.exchange_s
        for phase, sent in step.sent_bytes.items():
            before = self._phases.get(phase, (0, 0.0))
            self._phases[phase] = before[0] + sent, before[1] + step.collective_s.get(phase, 0.0)
        for name, value in step.values.items():
            self._values.setdefault(name, []).append(value)
        if step.residual_norm is not None:
            self._measured = {"residual_norm": number(step.residual_norm), "captured": number(step.captured)}

    def as_record(self) -> dict[str, Any]:
        """For JSON. Times are in seconds, and are not written finer than a microsecond."""
        return {
            "step": self._last.number,
            "steps": self.steps,
            "time_s": round(self._last.end_s - self._start_s, 6),
            "step_s": round(self._step_s, 6),
            "longest_s": round(self._longest_s, 6),
            "exchange_s": round(self._exchange_s, 6),
            "phases": {phase: (sent, round(spent_s, 6)) for phase, (sent, spent_s) in self._phases.items()},
            "dense_bytes": self._dense_bytes,
            "skipped": self._skipped,
            "values": as_json({name: sum(values) / len(values) for name, values in self._values.items()}),
            **self._measured,
        }


def as_json(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers by name, None where one is not finite."""
    return {name: number(value) for name, value in values.items()}


def number(value: float | None) -> float | None:
    """Six digits; None where there is no number: JSON has no NaN."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
