"""``hvd-sketch merge-traces``: traces of ranks, of torch's profiler and of Horovod on one axis of time."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_sketch.files import replaced, require_other
from hvd_sketch.logs.trace import PERIOD_NS

START_OF_HOROVOD = "start_time_since_epoch_in_micros"
BETWEEN = re.compile(r"\s*,?\s*")  # events
IDS = ("id", "bind_id")  # of arrows and of what goes on beside others; viewers drop those that are no whole numbers
LONGEST_EVENT = 1 << 16  # characters: where more cannot be read, a file is damaged, and not cut short
Event = dict[str, Any]
# What it raises to read a file of another kind, or a damaged one.
NOT_A_TRACE = (
    *(AttributeError, EOFError, KeyError, OverflowError, RecursionError, TypeError, ValueError),
    *(gzip.BadGzipFile, zlib.error),
)


def merge_traces(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write one trace of several, for a viewer that opens one file.

    Args:
        paths: what ``DistributedOptimizer(trace=…)``, ``export_chrome_trace`` of torch's profiler, or Horovod's
            ``HOROVOD_TIMELINE`` has written.
        output: is replaced.

    Returns:
        What was written, for JSON: the trace, and how many events of how many processes it has.

    Raises:
        ValueError: a file is no such trace; the output is one of them.
        OSError: the file could not be written.
    """
    require_other(output, paths)
    merged: list[Event] = []
    processes: dict[tuple[Path, Any], int] = {}
    arrows: dict[tuple[Path, Any], int] = {}
    names = [path.name for path in paths]
    for path in paths:
        told = path.name if names.count(path.name) == 1 else str(path)
        try:
            for event in _events(path):
                number = processes.setdefault((path, event.get("pid")), len(processes))
                numbers = {key: arrows.setdefault((path, event[key]), len(arrows) + 1) for key in IDS if key in event}
                merged.append({**event, "pid": number, **numbers, **_named(event, told)})
        except NOT_A_TRACE as error:
            raise ValueError(
                f"{path} is no trace ({error}): expected what DistributedOptimizer(trace=…), torch's profiler, or "
                "HOROVOD_TIMELINE writes"
            ) from error
    with replaced(output) as draft:
        draft.write_text(json.dumps({"traceEvents": merged, "displayTimeUnit": "ms"}, separators=(",", ":")))
    return {"trace": str(output), "events": len(merged), "processes": len(processes)}


def told(written: dict[str, Any]) -> str:
    """The same in words."""
    return f"{written['trace']}: {written['events']:,} events of {written['processes']} processes"


def _named(event: Event, path: str) -> Event:
    """The name of a process with that of its file, as several files have processes of one name."""
    if event.get("name") == "process_name" and "name" in event.get("args", {}):
        return {"args": {"name": f"{event['args']['name']} ({path})"}}
    return {}


def _events(path: Path) -> Iterator[Event]:
    """The events of a trace, their times in microseconds since the start of a period; see ``logs/trace.py``."""
    data = path.read_bytes()
    trace = _parsed((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    starts = [event["args"][START_OF_HOROVOD] for event in events if START_OF_HOROVOD in event.get("args", {})]
    base_us = trace.get("baseTimeNanoseconds", 0) / 1000 if isinstance(trace, dict) else 0
    shift_us = (starts[0] if starts else base_us) % (PERIOD_NS / 1000)
    for event in events:
        yield {**event, "ts": event["ts"] + shift_us} if "ts" in event else event


def _parsed(text: str) -> Any:
    """JSON, or an array of events whose end is missing: those that are whole."""
    try:
        return json.loads(text)
    except ValueError:
        events = _whole_events(text)
        if not events:
            raise
        return events


def _whole_events(text: str) -> list[Any]:
    """The first events of an array whose end is missing; none where what is missing is no end."""
    decoder = json.JSONDecoder()
    events: list[Any] = []
    between = re.match(r"\s*\[\s*", text)
    while between is not None:
        try:
            event, end = decoder.raw_decode(text, between.end())
        except ValueError:
            return events if len(text) - between.end() <= LONGEST_EVENT else []
        events.append(event)
        between = BETWEEN.match(text, end)
    return []
