"""What writing down every step costs: the time spent in the log's own code against that of the steps, in one run.

``launch/mpirun.sh -n 2 -- python -m benchmarks.logging_cost``, or another launcher. One matrix of 1,000 x 1,000, by
default; a step is forward and backward pass, the recommended exchange at 100 times fewer bytes, and SGD.

Steps with and without a log, one after the other, would differ by more than the log costs where anything else runs on
the machine. So every call of the log is timed where it is made, between two parts of a step that have filled all caches
with other things. The time that this takes itself counts as the log's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_sketch
from benchmarks.network.records import Records, environment
from hvd_sketch.observer import Kind, Observer
from hvd_sketch.transport import Transport, resolve_transport

WARM_UP = 100  # steps in which kernels are loaded and memory is touched


class Weighed(Observer):
    """An observer around another one, with the time that is spent in it.

    Attributes:
        spent_s: so far, by method.
    """

    def __init__(self, inner: Observer) -> None:
        self._inner = inner
        self.spent_s: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start_s = time.perf_counter()
        result = call(*arguments)
        self.spent_s[name] += time.perf_counter() - start_s
        return result

    def span(self, kind: Kind, name: str) -> AbstractContextManager[Any]:
        return _WeighedSpan(self, self.timed("spans", self._inner.span, kind, name))

    def accumulated(self) -> None:
        self.timed("norms", self._inner.accumulated)

    def end_step(self, step: int, is_averaged: bool) -> None:
        self.timed("end of the step", self._inner.end_step, step, is_averaged)

    def log_values(self, values: Mapping[str, Any]) -> None:
        self.timed("values", self._inner.log_values, values)

    def close(self) -> None:
        self._inner.close()


class _WeighedSpan(AbstractContextManager[Any]):
    def __init__(self, weighed: Weighed, inner: AbstractContextManager[Any]) -> None:
        self._weighed, self._inner = weighed, inner

    def __enter__(self) -> None:
        self._weighed.timed("spans", self._inner.__enter__)

    def __exit__(self, *failure: Any) -> None:
        self._weighed.timed("spans", self._inner.__exit__, *failure)


def main() -> None:
    arguments = _parse_arguments()
    transport = resolve_transport("auto")
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.keep or Path(folder, "run.jsonl")
        trace = Path(folder, "trace.json") if arguments.trace else None
        step_s, parts_s = measure(arguments, transport, log=log, trace=trace)
    if transport.rank != 0:
        return
    spent_s, coordinates = sum(parts_s.values()), arguments.side**2
    print(f"{coordinates:,} coordinates, {transport.size} ranks, {arguments.steps} steps of {1e3 * step_s:.2f} ms")
    told = ", ".join(f"{name} {1e6 * part_s:.0f}" for name, part_s in parts_s.items())
    print(f"in the log {1e6 * spent_s:.0f} us a step, {spent_s / step_s:.2%} ({told})")
    if arguments.json is not None:
        setting = {"transport": type(transport).__name__, "ranks": transport.size, "coordinates": coordinates}
        setting |= {"steps": arguments.steps, "trace": arguments.trace}
        found = {"step_s": step_s, "log_s": spent_s, "share": spent_s / step_s}
        Records(arguments.json).append({**setting, **found, "parts_s": parts_s, **environment()})


def measure(
    arguments: argparse.Namespace, transport: Transport, **places: Path | None
) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and those of it that are spent in each method of the log."""
    model, inputs = nn.Linear(arguments.side, arguments.side, bias=False), torch.randn(arguments.batch, arguments.side)
    compression = hvd_sketch.recommended(model.parameters(), ratio=100, ranks=transport.size)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = hvd_sketch.DistributedOptimizer(inner, model.named_parameters(), compression, transport, **places)
    hvd_sketch.broadcast_parameters(model.state_dict(), 0, transport)
    weighed = optimizer.ledger.observer = Weighed(optimizer.ledger.observer)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.log_values(loss=loss)
            optimizer.step()

    train(WARM_UP)
    weighed.spent_s.clear()
    start_s = time.perf_counter()
    train(arguments.steps - WARM_UP)
    elapsed_s = time.perf_counter() - start_s
    parts_s = {name: spent_s / (arguments.steps - WARM_UP) for name, spent_s in weighed.spent_s.items()}
    optimizer.close_logs()
    return elapsed_s / (arguments.steps - WARM_UP), parts_s


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100, help=f"the first {WARM_UP} are not timed")
    parser.add_argument("--side", type=int, default=1000, help="of the matrix")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trace", action="store_true", help="write a trace, too")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where to leave the log, for hvd-sketch report")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a record to this file")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, got {arguments.steps}")
    return arguments


if __name__ == "__main__":
    main()
