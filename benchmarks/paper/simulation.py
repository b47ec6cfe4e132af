"""Many small sketched exchanges between many workers, in one thread: equal to the real ones to the bit.

:class:`hvd_sketch.SketchedAllreduce` spends milliseconds per step in collectives and calls, whatever the dimension;
a hundred thousand steps of ten problems of dimension 785 would take hours. Here one pass over arrays
``[workers, problems, dim]`` does the same sums in the same order. tests/paper/test_mnist.py compares every step.
Per coordinate and row 12 bytes of hash are written out, so this is for small dimensions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from benchmarks.paper.experiment import Traffic
from hvd_sketch import CommLedger, DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.kernels.selection import Threshold, search
from hvd_sketch.sketch import fill_at_random, heavy_threshold
from hvd_sketch.transport.base import sum_in_rank_order

KERNELS = load_backend(None, torch.device("cpu"))
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class SimulatedAllreduce:
    """``problems`` exchanges of ``dim`` coordinates, each between ``workers``, under one config.

    The peer of as many ``SketchedAllreduce(config, dim, transport)`` with ``deterministic=True``.
    """

    def __init__(self, config: SketchConfig, dim: int, workers: int, problems: int) -> None:
        self._config, self._dim = config, dim
        self._step = 0
        self._v = np.zeros((workers, problems, dim), dtype=np.float32)
        self._u = np.zeros_like(self._v) if config.momentum else None
        self._predictors = [ThresholdPredictor() for _ in range(problems)]

    def step(self, gradients: Tensor) -> Tensor:
        """The mean update of every problem, zero where nothing is sent: float32 [problems, dim].

        Args:
            gradients: float32 [workers of this process, problems, dim], finite.
        """
        c, produced = self._config, gradients.numpy()
        workers, problems, _ = produced.shape
        if self._u is not None:
            self._u *= np.float32(c.momentum)
            self._u += produced
        self._v += produced if self._u is None else self._u
        cells, signs = _write_out(BlockHash(self._dim, c.rows, c.cols, workers, c.seed, self._step))
        tables = _summed_sketches(self._v, cells, signs, c.cols // workers * workers)
        estimates = _medians(tables, cells, signs)
        update = np.zeros((problems, self._dim), dtype=np.float32)
        for problem, candidates in enumerate(self._candidates(tables, estimates)):
            sums = sum_in_rank_order(list(torch.from_numpy(self._v[:, problem, candidates]))).numpy()
            largest = np.argsort(-np.abs(sums), kind="stable")[: c.k]
            chosen = candidates[largest[sums[largest] != 0]]
            update[problem, candidates[largest]] = sums[largest] / np.float32(workers)
            for kept in (self._v,) if self._u is None else (self._v, self._u):
                kept[:, problem, chosen] = 0
        self._step += 1
        return torch.from_numpy(update)

    def _candidates(self, tables: Floats, estimates: Floats) -> list[Ints]:
        """The coordinates of each problem that get exact sums: int64, ascending."""
        c = self._config
        if c.candidates == "sketch":
            return [self._select(number, own, c.candidate_count(self._dim))[0] for number, own in enumerate(estimates)]
        chosen = []
        for number, (own, norm) in enumerate(zip(estimates, _norms(tables, len(self._v)), strict=True)):
            own[(own.view(np.int32) & MAGNITUDE_MASK) <= heavy_threshold(norm, c.k)] = 0
            heavy, threshold = self._select(number, own, c.k)
            if threshold.excess:
                heavy = heavy[(own[heavy].view(np.int32) & MAGNITUDE_MASK) >= threshold.upper]
            chosen.append(fill_at_random(torch.from_numpy(heavy), c.k, self._dim, c.seed, self._step).numpy())
        return chosen

    def _select(self, problem: int, values: Floats, count: int) -> tuple[Ints, Threshold]:
        """At least the ``count`` largest of one problem's estimates, as a rank that had them all would choose them."""
        tensor = torch.from_numpy(values)

        def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
            counts = KERNELS.magnitude_histogram(tensor, start, shift, bins)
            return counts, counts

        threshold = search(look, count, self._predictors[problem].lower_bound())
        self._predictors[problem].update(threshold.edge)
        return KERNELS.select_above(tensor, threshold.edge - 1).numpy(), threshold

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit."""
        u = None if self._u is None else torch.from_numpy(self._u.copy())
        return {"step": self._step, "v": torch.from_numpy(self._v.copy()), "u": u}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._v[:] = state["v"].numpy()
        if self._u is not None:
            self._u[:] = state["u"].numpy()


class SimulatedMean:
    """``u <- m * u + mean over workers``, summed in rank order: the peer of :class:`hvd_sketch.DenseAllreduce`."""

    def __init__(self, momentum: float, dim: int, problems: int) -> None:
        self._momentum = momentum
        self._u = torch.zeros(problems, dim)

    def step(self, gradients: Tensor) -> Tensor:
        mean = sum_in_rank_order(list(gradients)).div_(len(gradients))
        self._u = mean.add_(self._u * self._momentum)
        return self._u

    def state_dict(self) -> dict[str, Any]:
        return {"u": self._u.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._u = state["u"].clone()


class RealExchanges:
    """One exchange per problem over this rank's transport, one after the other. Communication: collective.

    Args:
        make: an exchange that writes into the ledger given.
    """

    def __init__(self, make: Callable[[CommLedger], SketchedAllreduce | DenseAllreduce], problems: int) -> None:
        self._ledger = CommLedger(max_records=0)
        self._exchanges = [make(self._ledger) for _ in range(problems)]

    def step(self, gradients: Tensor) -> Tensor:
        """See :meth:`SimulatedAllreduce.step`; this process has one worker."""
        (own,) = gradients
        updates = torch.zeros_like(own)
        for exchange, gradient, update in zip(self._exchanges, own, updates, strict=True):
            sent = exchange.step(gradient)
            update[sent.indices] = sent.values
        return updates

    def traffic(self) -> Traffic:
        """Of all steps, all problems together."""
        return Traffic.of(self._ledger, len(self._exchanges))

    def state_dict(self) -> dict[str, Any]:
        return {
            "problems": [exchange.state_dict() for exchange in self._exchanges],
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for exchange, saved in zip(self._exchanges, state["problems"], strict=True):
            exchange.load_state_dict(saved)
        self._ledger.load_state_dict(state["ledger"])


def _write_out(hash: BlockHash) -> tuple[Ints, Floats]:
    """Where in its row of the table each coordinate is, int64 [rows, dim], and its signs, float32 [rows, dim]."""
    index = np.arange(hash.dim)
    placed = [hash.cells(row, index) for row in range(hash.rows)]
    cells = np.stack([shard * hash.shard_cols + column for shard, column in placed])
    return cells, np.stack([hash.signs(row, index) for row in range(hash.rows)])


def _norms(tables: Floats, shards: int) -> list[float]:
    """Each problem's estimate of the l2 norm, from tables [problems, rows, shards * cols]."""
    by_shard = torch.from_numpy(tables.reshape(*tables.shape[:2], shards, -1))
    energies = torch.linalg.vector_norm(by_shard, dim=3, dtype=torch.float64).square().sum(dim=2)
    return np.sqrt(np.median(energies.numpy(), axis=1)).tolist()


@njit(cache=True)
def _summed_sketches(v: Floats, cells: Ints, signs: Floats, cols: int) -> Floats:
    """Every problem's table, summed over the workers in rank order: float32 [problems, rows, cols]."""
    workers, problems, dim = v.shape
    rows = len(cells)
    tables = np.zeros((problems, rows, cols), dtype=np.float32)
    own = np.empty(cols, dtype=np.float32)
    for problem in range(problems):
        for row in range(rows):
            for worker in range(workers):
                own[:] = 0
                for i in range(dim):
                    own[cells[row, i]] += signs[row, i] * v[worker, problem, i]
                for cell in range(cols):
                    tables[problem, row, cell] += own[cell]
    return tables


@njit(cache=True)
def _medians(tables: Floats, cells: Ints, signs: Floats) -> Floats:
    """Estimates from the tables: float32 [problems, dim]."""
    problems, rows, _ = tables.shape
    dim = cells.shape[1]
    estimates = np.empty((problems, dim), dtype=np.float32)
    votes = np.empty(rows, dtype=np.float32)
    for problem in range(problems):
        for i in range(dim):
            for row in range(rows):  # sorted by insertion
                vote, at = signs[row, i] * tables[problem, row, cells[row, i]], row
                while at and votes[at - 1] > vote:
                    votes[at] = votes[at - 1]
                    at -= 1
                votes[at] = vote
            lower, upper = votes[(rows - 1) // 2], votes[rows // 2]
            estimates[problem, i] = upper if rows % 2 else (lower + upper) * np.float32(0.5)
    return estimates
