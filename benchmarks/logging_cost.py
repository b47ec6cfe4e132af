"""What writing down every step costs: steps with a log against steps without, alternating in one run.

``launch/mpirun.sh -n 2 -- python -m benchmarks.logging_cost``, or by another launcher. One matrix of 1,000 x 1,000, by
default; a step is forward and backward pass, the recommended exchange at 100 times fewer bytes, and SGD. Fifty steps
with the log and fifty without are a pair. One of the fifty measures the residual.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hvd_sketch
from hvd_sketch.logs.step_observer import NORM_EVERY
from hvd_sketch.observer import Observer
from hvd_sketch.transport import Transport, resolve_transport


class Training:
    """One rank's training, with a log and a trace that can be left out from block to block."""

    def __init__(self, transport: Transport, side: int, batch: int, folder: Path, has_trace: bool) -> None:
        self._model = nn.Linear(side, side, bias=False)
        self._inputs = torch.randn(batch, side)
        compression = hvd_sketch.recommended(self._model.parameters(), ratio=100, ranks=transport.size)
        inner = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        places = {"log": folder / "run.jsonl", "trace": folder / "trace.json" if has_trace else None}
        self._optimizer = hvd_sketch.DistributedOptimizer(
            inner, self._model.named_parameters(), compression, transport, **places
        )
        hvd_sketch.broadcast_parameters(self._model.state_dict(), 0, transport)
        self._observers = {True: self._optimizer.ledger.observer, False: Observer()}

    def block_s(self, is_logged: bool) -> float:
        """Seconds of a block of steps."""
        self._optimizer.ledger.observer = self._observers[is_logged]
        start_s = time.perf_counter()
        for _ in range(NORM_EVERY):
            self._optimizer.zero_grad()
            loss = self._loss()
            loss.backward()
            self._optimizer.log_values(loss=loss)
            self._optimizer.step()
        return time.perf_counter() - start_s

    def _loss(self) -> Tensor:
        return self._model(self._inputs).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--side", type=int, default=1000, help="of the matrix")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trace", action="store_true", help="write a trace, too")
    arguments = parser.parse_args()
    transport = resolve_transport("auto")
    with tempfile.TemporaryDirectory() as folder:
        training = Training(transport, arguments.side, arguments.batch, Path(folder), arguments.trace)
        for is_logged in (True, False):  # kernels are loaded, memory is touched
            training.block_s(is_logged)
        seconds = []
        for number in range(arguments.pairs):
            order = (True, False) if number % 2 else (False, True)
            pair = {is_logged: training.block_s(is_logged) for is_logged in order}
            seconds.append((pair[True], pair[False]))
        if transport.rank == 0:
            report(np.array(seconds), arguments.side**2, transport.size)


def report(seconds: np.ndarray, coordinates: int, ranks: int) -> None:
    """Of pairs [n, 2]: the median of the ratios, and where it lies by drawing pairs again."""
    ratios = seconds[:, 0] / seconds[:, 1] - 1
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    step_ms = 1e3 * np.median(seconds[:, 1]) / NORM_EVERY
    print(f"{coordinates:,} coordinates, {ranks} ranks, {len(ratios)} pairs of {NORM_EVERY} steps of {step_ms:.2f} ms")
    print(f"with the log {np.median(ratios):+.2%} (95 % of resampled medians: {low:+.2%} to {high:+.2%})")


if __name__ == "__main__":
    main()
