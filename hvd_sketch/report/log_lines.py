"""The lines of one rank's log, read back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_sketch.logs.run_log import FORMAT

NUMBERS = ("step", "steps", "time_s", "step_s", "longest_s", "exchange_s", "dense_bytes", "skipped")  # of every line
SUMS = ("step_s", "exchange_s", "dense_bytes", "skipped")  # over the steps of a line
MOST = 1e30  # of a number of bytes or seconds: sums over all lines are finite, too
Lines = dict[int, dict[str, Any]]  # by the number of their last step, ascending


def read_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """What a log says of the run, and its lines; of what was trained again, those of the last time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no log; a line is not as it was written.
    """
    about: dict[str, Any] = {}
    lines: Lines = {}
    before_s = 0.0  # of training, before the last start
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not texts:
        raise ValueError(f"{path} is empty: expected a file that DistributedOptimizer(log=…) wrote, with some steps")
    for text in texts:
        try:
            record = json.loads(text)
        except (RecursionError, ValueError):
            continue  # cut short by a kill
        if not isinstance(record, dict):
            continue
        if not _is_as_written(record):
            raise ValueError(f"{path} has a line that DistributedOptimizer(log=…) has not written so: {text:.200}")
        if "run" in record:
            about, before_s = record, max((line["time_s"] for line in lines.values()), default=0.0)
        elif "step" in record:
            _take_back(lines, record["step"] - record["steps"])
            lines[record["step"]] = {**record, "time_s": before_s + record["time_s"]}
        elif lines:
            last = lines[next(reversed(lines))]
            last["values"] = {**last["values"], **record.get("values", {})}
            rest_s = record.get("step_s", 0.0)  # of local steps whose exchange did not come
            last |= {"step_s": last["step_s"] + rest_s, "time_s": last["time_s"] + rest_s}
            last["dense_bytes"] += record.get("dense_bytes", 0)
    if about.get("run") != FORMAT:
        raise ValueError(
            f"{path} is no log of this version: expected a file that DistributedOptimizer(log=…) wrote, of format "
            f"{FORMAT}, found {about.get('run', 'another')}"
        )
    return about, lines


def _take_back(lines: Lines, last: int) -> None:
    """Remove what comes after the step ``last`` and is trained again; of a line of several steps their share stays."""
    while lines and next(reversed(lines)) > last:
        step, line = lines.popitem()
        steps = last - (step - line["steps"])  # of the line, that stay
        if steps > 0:
            share = steps / line["steps"]
            lines[last] = {
                **line,
                **{name: share * line[name] for name in SUMS},
                **{"step": last, "steps": steps},
                "time_s": line["time_s"] - (1 - share) * line["step_s"],
                "phases": {phase: [share * each for each in pair] for phase, pair in line["phases"].items()},
            }


def _is_as_written(record: Mapping[str, Any]) -> bool:
    """Whether a line has what is read of its kind."""
    if "run" in record:
        return record["run"] != FORMAT or (type(record.get("size")) is int and _is_number(record.get("started", 0)))
    values, phases = record.get("values", {}), record.get("phases", {})
    if not isinstance(values, dict) or not all(value is None or _is_number(value) for value in values.values()):
        return False
    if "step" not in record:
        return all(_is_number(record.get(name, 0), MOST) for name in ("step_s", "dense_bytes"))
    measured = [record[name] for name in ("residual_norm", "captured") if record.get(name) is not None]
    return (
        all(_is_number(record.get(name), MOST) for name in NUMBERS)
        and record["steps"] >= 1
        and {"values", "phases"} <= record.keys()
        and isinstance(phases, dict)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(_is_number(each, MOST) for each in pair)
            for pair in phases.values()
        )
        and all(map(_is_number, measured))
    )


def _is_number(value: object, most: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and abs(value) <= most
