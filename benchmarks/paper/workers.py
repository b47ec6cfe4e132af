"""Many workers in one process for large models: their exchanges on the library's own kernels, on a CPU or a GPU.

Gradients come one worker after the other, so that only one exists at a time::

    for worker in range(workers):
        exchange.add(worker, gradient)
    update = exchange.finish()

:class:`SketchedWorkers` and :class:`DenseWorkers` equal ``SketchedAllreduce`` and ``DenseAllreduce`` with
``deterministic=True`` on as many ranks to the bit, and write the same records into their ledger: every step is compared
in tests/paper/test_workers.py. Kept are u and v of every worker (8 bytes per worker and coordinate), one table and one
sum of tables.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.one_process import encoded_bytes
from benchmarks.paper.workers_base import PAPER, FeedbackWorkers, Variant, Workers
from hvd_sketch import CountSketch
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.sketched import all_sums_travel
from hvd_sketch.exchange.threshold import LocalValues, ThresholdPredictor, find_threshold
from hvd_sketch.kernels.selection import Threshold, top_k
from hvd_sketch.sketch import fill_at_random, heavy_threshold, row_energies

__all__ = ["METHODS", "PAPER", "DenseWorkers", "LocalTopK", "SketchedWorkers", "TrueTopK", "Variant", "Workers"]

TABLE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DenseWorkers(Workers):
    """``u <- m u + mean`` of whole gradients: the peer of ``DenseAllreduce``. Where momentum is applied is the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.variant = replace(self.variant, momentum="none" if self.variant.momentum == "none" else "before")
        self._momentum = 0.0 if self.variant.momentum == "none" else self.config.momentum
        self._total, self._u = (torch.zeros(self.dim, device=self._device) for _ in range(2))

    def _take_in(self, worker: int, parts: list[Tensor]) -> None:
        gradient = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._total.copy_(gradient) if worker == 0 else self._total.add_(gradient)

    def _agree(self) -> SparseUpdate:
        mean = self._total / self.workers
        if self._momentum:
            mean += self._u * self._momentum
            self._u.copy_(mean)
        padded_bytes = 4 * self.workers * -(-self.dim // self.workers)
        self._record("dense", "reduce_scatter", padded_bytes)
        self._record_allgather("dense", padded_bytes)
        self.ledger.compare_with_dense(self.dim, 4 * self.dim, 2 * self.dim)
        return SparseUpdate(torch.arange(self.dim, device=self._device), mean)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "u": self._u.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._late_u = self._late_u[:0]
        self._u.copy_(state["u"])


class SketchedWorkers(FeedbackWorkers):
    """Alg. 3 of the paper (Alg. 2 with HEAVYMIX): the peer of ``SketchedAllreduce``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        c = self.config
        self._sketch = CountSketch(self.dim, c.rows, c.cols, c.seed, shards=self.workers, device=self._device)
        self._summed = torch.zeros_like(self._sketch.table)
        self._predictors = (
            ThresholdPredictor(),
            ThresholdPredictor(),
        )  # of estimates and of sums: how often histograms travel

    def _take_in(self, worker: int, parts: list[Tensor]) -> None:
        self._sketch.zero_(self._step if self.variant.fresh_hashes else 0)
        self._add_feedback(self._feedbacks[worker], parts, self._sketch)
        table = self._sketch.table.to(TABLE_DTYPES[self.variant.table_dtype])
        self._summed.copy_(table) if worker == 0 else self._summed.add_(table)

    def _agree(self) -> SparseUpdate:
        dtype = TABLE_DTYPES[self.variant.table_dtype]
        for row in self._summed:
            self._record("sketch", "reduce_scatter", row.numel() * dtype.itemsize, dtype)
        candidates = self._heavymix() if self.config.selection == "heavymix" else self._top_candidates()
        sums = self._sum_exactly(candidates)
        positions = self._keep_largest(sums)
        self.ledger.compare_with_dense(self.dim, 4 * self.dim, self.config.paper_floats(self.dim))
        indices = candidates[positions]
        self._clear_all(indices)
        return SparseUpdate(indices, sums[positions] / self.workers)

    def _estimates(self) -> Tensor:
        return self._kernels.estimate(self._sketch.hash, self._summed, 0, self.dim)

    def _top_candidates(self) -> Tensor:
        estimates, predictor = self._estimates(), self._predictors[0]
        threshold = self._find("select", estimates, self.config.candidates(self.dim), predictor.lower_bound())
        predictor.update(threshold)
        return self._tell_all(self._kernels.select_above(estimates, threshold.edge - 1))

    def _find(self, phase: str, values: Tensor, count: int, lower_bound: int = 0) -> Threshold:
        with self._comm.phase(phase):
            return find_threshold(LocalValues(self._kernels, values), count, self._comm, lower_bound)

    def _heavymix(self) -> Tensor:
        k = self.config.k
        by_shard = [row_energies(self._summed[:, shard]).tolist() for shard in range(self.workers)]
        self._record_allgather("norm", 8 * self.workers * self.config.rows, torch.float64)
        norm = math.sqrt(np.median([math.fsum(row) for row in zip(*by_shard, strict=True)]))
        estimates = self._estimates()
        above = self._kernels.select_above(estimates, heavy_threshold(norm, k))
        threshold = self._find("select", estimates[above], k)
        edge = threshold.upper if threshold.excess else threshold.edge
        heavy = self._tell_all(above[self._kernels.select_above(estimates[above], edge - 1)])
        return fill_at_random(heavy, k, self.dim, self.config.seed, self._step)

    def _tell_all(self, chosen: Tensor) -> Tensor:
        self._record_allgather("indices", encoded_bytes(self._sketch.hash, chosen), torch.uint8)
        return chosen

    def _sum_exactly(self, candidates: Tensor) -> Tensor:
        """Sums of v over the workers in rank order at the candidates."""
        total = self._feedbacks[0].v[candidates]
        for feedback in self._feedbacks[1:]:
            total += feedback.v[candidates]
        self._record("exact", "reduce_scatter", 4 * self.workers * self._part(candidates))
        return total

    def _part(self, candidates: Tensor) -> int:
        return -(-candidates.numel() // self.workers)

    def _keep_largest(self, sums: Tensor) -> Tensor:
        """Positions of the k largest; in the way that takes ``SketchedAllreduce._keep_largest`` less time."""
        k, count, part = self.config.k, sums.numel(), self._part(sums)
        if all_sums_travel(count, k):
            self._record_allgather("values", 4 * self.workers * part)
            return top_k(sums, k)
        predictor = self._predictors[1]
        threshold = self._find("choose", sums, k, predictor.lower_bound())
        predictor.update(threshold)
        self._record_allgather("values", self.workers * -(-part // 8) + 4 * threshold.own, torch.uint8)
        return top_k(sums, k)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thresholds": [predictor.edges for predictor in self._predictors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for predictor, saved in zip(self._predictors, state["thresholds"], strict=True):
            predictor.edges = saved


class TrueTopK(FeedbackWorkers):
    """The k largest of the exact sum of all v. It exists in a simulation only, so no bytes are recorded.

    The paper's ratio is of k floats up and k down.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._total = torch.zeros(self.dim, device=self._device)

    def _take_in(self, worker: int, parts: list[Tensor]) -> None:
        feedback = self._feedbacks[worker]
        self._add_feedback(feedback, parts)
        self._total.copy_(feedback.v) if worker == 0 else self._total.add_(feedback.v)

    def _agree(self) -> SparseUpdate:
        indices = self._largest(self._total)
        self._clear_all(indices)
        self.ledger.compare_with_dense(self.dim, 4 * self.dim, 2 * self.config.k)
        return SparseUpdate(indices, self._total[indices] / self.workers)


class LocalTopK(FeedbackWorkers):
    """Every worker sends the k largest of its own v, and the update is the mean over all that was sent.

    Each rank's 8 bytes per coordinate go to all others by allgather. The paper's ratio is of k floats up and the
    whole union down.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._total = torch.zeros(self.dim, device=self._device)
        self._is_sent = torch.zeros(self.dim, dtype=torch.bool, device=self._device)
        self._sent = 0  # of the step, all workers together

    def _take_in(self, worker: int, parts: list[Tensor]) -> None:
        feedback = self._feedbacks[worker]
        if worker == 0:
            self._total.zero_()
            self._is_sent.zero_()
            self._sent = 0
        self._add_feedback(feedback, parts)
        own = self._largest(feedback.v)
        self._total[own] += feedback.v[own]
        self._is_sent[own] = True
        self._sent += own.numel()
        self._clear(feedback, own)

    def _agree(self) -> SparseUpdate:
        indices = self._is_sent.nonzero().flatten()
        self._record_allgather("local", 8 * self._sent)
        self.ledger.compare_with_dense(self.dim, 4 * self.dim, self.config.k + indices.numel())
        return SparseUpdate(indices, self._total[indices] / self.workers)


METHODS: dict[str, type[Workers]] = {
    "dense": DenseWorkers,
    "true_topk": TrueTopK,
    "sketched": SketchedWorkers,
    "local_topk": LocalTopK,
}
