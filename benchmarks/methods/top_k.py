"""The k largest coordinates without a sketch: of every rank's own gradient, or of the true sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.base import Lean
from hvd_sketch.coding import host
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.transport.base import mean_over_ranks
from hvd_sketch.wire_bytes import coded_bytes


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


class CodedTopK(LocalTopK):
    """Local top-k with the codes of our own exchanges: positions in a Rice code, values of ``value_bits`` bits.

    What rounding leaves out stays in v. u is zeroed where something was sent: with ``momentum`` this is Deep Gradient
    Compression. Then ``v <- residual_decay * v``. On the CPU.
    """

    def __init__(self, *place: Any, **options: Any) -> None:
        super().__init__(*place, **options)
        self._kernels = load_backend(None, self._device)

    def agree(self) -> SparseUpdate:
        own = self._choose()
        codes = self._encode(self.residual[own])
        with self._comm.phase("local"):
            positions = _decode_each(self._comm.allgather(host.encode_positions(own, self.dim)))
            gathered = self._comm.allgather(codes)
        self._feedback.subtract_(own, self._decode(codes, own.numel()))
        sizes = [coded_bytes(each.numel(), self.config.value_bits) for each in positions]
        mean = torch.zeros(self.dim)
        for indices, code in zip(positions, gathered.split(sizes), strict=True):
            mean.index_add_(0, indices, self._decode(code, indices.numel()), alpha=1 / self._comm.size)
        if self.config.residual_decay < 1:
            self._feedback.decay_(self.config.residual_decay, [(0, self.dim)])
        self.count_step()
        return self._update(own, mean)

    def _choose(self) -> Tensor:
        """The coordinates that this rank sends, int64 [n], ascending."""
        return top_k(self._offered(), self.config.k)

    def _encode(self, values: Tensor) -> Tensor:
        """uint8 [bytes] of float32 [n]."""
        if self.config.value_bits == 32:
            return values.view(torch.uint8)
        return self._kernels.quantize(values.view(1, -1), self.config.value_bits)[0]

    def _decode(self, code: Tensor, count: int) -> Tensor:
        """float32 [count]."""
        if self.config.value_bits == 32:
            return code.clone().view(torch.float32)
        return self._kernels.dequantize_sum(code.view(1, 1, -1), count, self.config.value_bits)[0]


def _decode_each(encoded: Tensor) -> list[Tensor]:
    """The positions of every rank's code, one after the other: int64 [n] each."""
    words = encoded.numpy().view("uint64")
    start, each = 0, []
    while start < len(words):
        positions, start = host._decode_stream(words, start)
        each.append(positions)
    return each


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
