"""The time of every step as a trace for Perfetto or chrome://tracing, beside torch's profiler."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from os import PathLike

from hvd_sketch.logs.line_file import MOST_BYTES, LineFile, path_of_rank
from hvd_sketch.logs.run_log import as_json
from hvd_sketch.logs.step_observer import Output, Step

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

    def __init__(self, path: str | PathLike[str], rank: int, size: int, most_bytes: int = MOST_BYTES) -> None:
        self._file = LineFile(path_of_rank(path, rank), most_bytes=most_bytes)
        self._rank = rank
        epoch_ns = time.time_ns()
        self._zero_s = (epoch_ns - epoch_ns // PERIOD_NS * PERIOD_NS) * 1e-9 - time.perf_counter()
        names = ("process_name", STEPS, f"hvd_sketch rank {rank} of {size}"), ("thread_name", STEPS, "steps")
        named = (*names, ("thread_name", EXCHANGE, "exchange"))
        self._begin = ["["]
        for name, thread, value in named:
            event = {"ph": "M", "name": name, "pid": rank, "tid": thread, "args": {"name": value}}
            self._begin.append(json.dumps(event) + ",")

    def write(self, steps: Sequence[Step]) -> None:
        lines = [*self._begin]
        for step in steps:
            lines += [
                self._span(name, EXCHANGE, kind.value, start_s, end_s) for kind, name, start_s, end_s in step.spans
            ]
            sent = sum(step.sent_bytes.values())
            told = {"sent_bytes": sent, "skipped": step.is_skipped, "values": as_json(step.values)}
            name, start_s = f"step {step.number}", step.end_s - step.step_s
            lines.append(self._span(name, STEPS, "step", start_s, step.end_s, f',"args":{json.dumps(told)}'))
        if self._file.write(lines):
            self._begin = []

    def close(self, last: Mapping[str, float]) -> None:
        self._file.close()

    def _span(self, name: str, thread: int, kind: str, start_s: float, end_s: float, more: str = "") -> str:
        """By hand: json.dumps takes four times as long."""
        start_us, us = 1e6 * (start_s + self._zero_s), 1e6 * (end_s - start_s)
        return (
            f'{{"ph":"X","name":"{name}","cat":"{kind}","pid":{self._rank},"tid":{thread},"ts":{start_us:.3f},'
            f'"dur":{us:.3f}{more}}},'
        )
