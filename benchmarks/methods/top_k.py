"""The k largest coordinates without a sketch: of every rank's own gradient, or of the true sum."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.methods.base import Lean
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.transport.base import mean_over_ranks


class _TopK(ResidualExchange):
    def _offered(self) -> Tensor:
        """v, float32 [dim], with zeros where nothing may be sent."""
        if not self._unused:
            return self.residual
        offered = self.residual.clone()
        for start, stop in self._unused:
            offered[start:stop] = 0
        return offered


class LocalTopK(Lean, _TopK):
    """Every rank sends the k largest of its own v, and the update is the mean over all that was sent.

    Each rank's 8 bytes per coordinate go to all others. Chosen with our selection, which takes a twentieth of the time
    of torch.topk.
    """

    def agree(self) -> SparseUpdate:
        own = top_k(self._offered(), self.config.k)
        with self._comm.phase("local"):
            indices = self._comm.allgather(own.to(torch.int32)).to(torch.int64)
            values = self._comm.allgather(self.residual[own])
        self._feedback.clear_(own)
        self.count_step()
        mean = torch.zeros(self.dim, device=self._device)
        return self._update(indices, mean.index_add_(0, indices, values, alpha=1 / self._comm.size))

    def _update(self, indices: Tensor, mean: Tensor) -> SparseUpdate:
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.config.k)
        return SparseUpdate(None, mean)


class CountedTopK(LocalTopK):
    """Local top-k by the paper's count: k floats up, and the whole union down."""

    def _update(self, indices: Tensor, mean: Tensor) -> SparseUpdate:
        union = indices.unique()
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, self.config.k + union.numel())
        return SparseUpdate(union, mean[union])


class TrueTopK(_TopK):
    """The k largest of the exact sum of all v: what every choice of k coordinates is held against.

    It cannot be had without sending everything, so its bytes are not recorded. The paper's ratio is of k floats up and
    k down.
    """

    def agree(self) -> SparseUpdate:
        mean = mean_over_ranks(self._transport, self._offered())
        indices = top_k(mean, self.config.k)
        self._feedback.clear_(indices)
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.config.k)
        self.count_step()
        return SparseUpdate(indices, mean[indices])
