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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_sketch
from hvd_sketch.observer import Kind, Observer
from hvd_sketch.transport import resolve_transport


class Weighed(Observer):
    """An observer around another one, with the time that is spent in it.

    Attributes:
        spent_s: so far.
    """

    def __init__(self, inner: Observer) -> None:
        self._inner = inner
        self.spent_s = 0.0

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        start_s = time.perf_counter()
        result = call(*arguments)
        self.spent_s += time.perf_counter() - start_s
        return result

    def span(self, kind: Kind, name: str) -> AbstractContextManager[Any]:
        return _WeighedSpan(self, self.timed(self._inner.span, kind, name))

    def accumulated(self) -> None:
        self.timed(self._inner.accumulated)

    def end_step(self, step: int, is_averaged: bool) -> None:
        self.timed(self._inner.end_step, step, is_averaged)

    def log_values(self, values: Mapping[str, Any]) -> None:
        self.timed(self._inner.log_values, values)


class _WeighedSpan(AbstractContextManager[Any]):
    def __init__(self, weighed: Weighed, inner: AbstractContextManager[Any]) -> None:
        self._weighed, self._inner = weighed, inner

    def __enter__(self) -> None:
        self._weighed.timed(self._inner.__enter__)

    def __exit__(self, *failure: Any) -> None:
        self._weighed.timed(self._inner.__exit__, *failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1000, help="of the matrix")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trace", action="store_true", help="write a trace, too")
    arguments = parser.parse_args()
    transport = resolve_transport("auto")
    model, inputs = nn.Linear(arguments.side, arguments.side, bias=False), torch.randn(arguments.batch, arguments.side)
    compression = hvd_sketch.recommended(model.parameters(), ratio=100, ranks=transport.size)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        places = {"log": Path(folder, "run.jsonl"), "trace": Path(folder, "trace.json") if arguments.trace else None}
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

        train(100)  # kernels are loaded, memory is touched
        weighed.spent_s, start_s = 0.0, time.perf_counter()
        train(arguments.steps)
        step_s = (time.perf_counter() - start_s) / arguments.steps
    spent_s = weighed.spent_s / arguments.steps
    if transport.rank == 0:
        coordinates, ranks = arguments.side**2, transport.size
        print(f"{coordinates:,} coordinates, {ranks} ranks, {arguments.steps} steps of {1e3 * step_s:.2f} ms")
        print(f"in the log {1e6 * spent_s:.0f} us a step, {spent_s / step_s:.2%}")


if __name__ == "__main__":
    main()
