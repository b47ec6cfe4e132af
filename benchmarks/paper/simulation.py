"""Many small sketched exchanges between many workers, in one thread: equal to the real ones to the bit.

:class:`hvd_sketch.SketchedAllreduce` spends milliseconds per step in collectives and calls, whatever the dimension;
a hundred thousand steps of ten problems of dimension 785 would take hours. Here one pass over arrays
``[workers, problems, dim]`` does the same sums in the same order. tests/paper/test_mnist.py compares every step.
Per coordinate and row 12 bytes of hash are written out, so this is for small dimensions only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from hvd_sketch import SketchConfig
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.sketch import fill_at_random, heavy_threshold
from hvd_sketch.transport.base import sum_in_rank_order

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

    def step(self, gradients: Tensor) -> Tensor:
        """See :class:`benchmarks.paper.exchanges.Exchange`; all workers are in this process."""
        return torch.from_numpy(self._step_arrays(gradients.numpy()))

    def _step_arrays(self, gradients: Floats) -> Floats:
        workers, problems, _ = gradients.shape
        if self._u is not None:
            self._u *= np.float32(self._config.momentum)
            self._u += gradients
        self._v += gradients if self._u is None else self._u
        c = self._config
        places = _Places(BlockHash(self._dim, c.rows, c.cols, workers, c.seed, self._step))
        tables = _summed_sketches(self._v, places.cells, places.signs, c.cols // workers * workers)
        estimates = _medians(tables, places.cells, places.signs)
        update = np.zeros((problems, self._dim), dtype=np.float32)
        for problem, candidates in enumerate(self._candidates(tables, estimates, places)):
            sums = sum_in_rank_order(list(torch.from_numpy(self._v[:, problem, candidates]))).numpy()
            largest = np.argsort(-np.abs(sums), kind="stable")[: c.k]
            chosen = candidates[largest[sums[largest] != 0]]
            update[problem, candidates[largest]] = sums[largest] / np.float32(workers)
            for kept in (self._v,) if self._u is None else (self._v, self._u):
                kept[:, problem, chosen] = 0
        self._step += 1
        return update

    def _candidates(self, tables: Floats, estimates: Floats, places: _Places) -> list[Ints]:
        """The coordinates of each problem that get exact sums: int64, ascending."""
        c = self._config
        if c.selection == "topk":
            count = c.candidates(self._dim)
            return [np.sort(order) for order in places.largest(estimates, [0] * len(estimates), count)]
        thresholds = [max(heavy_threshold(norm, c.k), 0) for norm in _norms(tables, len(self._v))]
        heavy = [torch.from_numpy(np.sort(order)) for order in places.largest(estimates, thresholds, c.k)]
        return [fill_at_random(h, c.k, self._dim, c.seed, self._step).numpy() for h in heavy]

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


class _Places:
    """One step's hash written out.

    Attributes:
        cells: int64 [rows, dim], where in its row of the table each coordinate lies.
        signs: float32 [rows, dim].
        by_owner: int64 [dim], the coordinates of rank 0, then of rank 1, ...: the order in which ties are dealt out.
    """

    def __init__(self, hash: BlockHash) -> None:
        index = np.arange(hash.dim)
        block, lane = index // hash.block, index % hash.block
        owner = hash.shard_of(block)
        offsets = np.stack([hash.offsets(row, np.arange(hash.blocks)) for row in range(hash.rows)])
        self.cells = owner * hash.shard_cols + (offsets[:, block] + lane) % hash.shard_cols
        self.signs = np.stack([hash.signs(row, index) for row in range(hash.rows)])
        self.by_owner = np.argsort(owner, kind="stable")

    def largest(self, estimates: Floats, thresholds: list[int], count: int) -> list[Ints]:
        """Of each problem's coordinates with magnitude bits above its threshold, the ``count`` largest."""
        magnitudes = estimates[:, self.by_owner].view(np.int32) & MAGNITUDE_MASK
        order = np.argsort(-magnitudes, axis=1, kind="stable")[:, :count]
        above = [magnitude[o] > limit for magnitude, o, limit in zip(magnitudes, order, thresholds, strict=True)]
        return [self.by_owner[o[mask]] for o, mask in zip(order, above, strict=True)]


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
