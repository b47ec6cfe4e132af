"""The time of every step as a trace for Perfetto or chrome://tracing, beside torch's profiler."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from os import PathLike
from typing import Any

from hvd_sketch.logs.line_file import MOST_BYTES, LineFile, path_of_rank
from hvd_sketch.logs.step_observer import Output, Step
from hvd_sketch.observer import Kind

# Since torch 2.2 its profiler counts from the last start of a period of three mean months. Traces that count from the
# same moment can be laid over each other.
PERIOD_NS = 7_889_238 * 10**9
STEPS, EXCHANGE = 0, 1  # rows of a rank


class TraceFile(Output):
    """Spans as events of the Trace Event Format, as an output of :class:`~hvd_sketch.logs.step_observer.StepObserver`.

    A process of the trace is a rank. Its file is an array of JSON, which readers take without its end: it is whole at
    any time.

    Args:
        path: of rank 0's trace; see :func:`~hvd_sketch.logs.line_file.path_of_rank`.
        rank, size: this one, and how many there are.
        most_bytes: after which no more is written: about 20 events a step, of 100 bytes each.
    """

    wants_spans = True

    def __init__(self, path: str | PathLike[str], rank: int, size: int, most_bytes: int = MOST_BYTES) -> None:
        self._file = LineFile(path_of_rank(path, rank), most_bytes=most_bytes)
        self._rank = rank
        epoch_ns = time.time_ns()
        self._zero_s = (epoch_ns - epoch_ns // PERIOD_NS * PERIOD_NS) * 1e-9 - time.perf_counter()
        self._file.write("[")
        names = ("process_name", STEPS, f"hvd_sketch rank {rank} of {size}"), ("thread_name", STEPS, "steps")
        for name, thread, value in (*names, ("thread_name", EXCHANGE, "exchange")):
            self._write({"ph": "M", "name": name, "pid": rank, "tid": thread, "args": {"name": value}})

    def span(self, kind: Kind, name: str, start_s: float, end_s: float) -> None:
        start_us = 1e6 * (start_s + self._zero_s)
        self._file.write(
            f'{{"ph":"X","name":"{name}","cat":"{kind.value}","pid":{self._rank},"tid":{EXCHANGE},'
            f'"ts":{start_us:.3f},"dur":{1e6 * (end_s - start_s):.3f}}},'
        )

    def step(self, step: Step) -> None:
        end_us = 1e6 * (time.perf_counter() + self._zero_s)
        begin_us, duration_us = end_us - 1e6 * step.step_s, 1e6 * step.step_s
        args = {"sent_bytes": sum(step.sent_bytes.values()), "skipped": step.is_skipped, "values": step.values}
        self._file.write(
            f'{{"ph":"X","name":"step {step.number}","cat":"step","pid":{self._rank},"tid":{STEPS},'
            f'"ts":{begin_us:.3f},"dur":{duration_us:.3f},"args":{json.dumps(args)}}},'
        )

    def close(self, last: Mapping[str, float]) -> None:
        self._file.close()

    def _write(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(event) + ",")
