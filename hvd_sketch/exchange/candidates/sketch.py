"""Candidates from the summed Count Sketch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.candidates.on_device import largest_above
from hvd_sketch.exchange.threshold import Magnitudes, ShardEstimates, ThresholdPredictor, find_threshold
from hvd_sketch.hashing import Purpose, ceil_div, random_words
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import SORTED, Threshold, search, top_k
from hvd_sketch.sketch import CountSketch
from hvd_sketch.transport.base import Handle
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.staging import one_behind

# Estimates an owner may keep, in units of its share of the candidates; at the lower bound and above are 1.1 to 1.6.
KEPT_PER_CANDIDATE = 2
KEPT_ALWAYS = 1 << 16
CELLS_TOGETHER = 1 << 17  # of a table whose rows travel together


class SketchCandidates:
    """The ``P * k`` largest estimates of the summed sketches (paper, Alg. 3, lines 3 and 4).

    The table is summed by reduce_scatter: each rank holds the sum of the columns of its own shard only, and
    judges the coordinates that hash into them, alone. So no two ranks can disagree through rounding, and the
    time to recover falls with the number of ranks.

    Where all candidates are kept (``P = 1``), every owner names its own shard's part of k, and the ranks count
    nothing together: hashing deals the large coordinates out evenly.

    Where the transport overlaps, each row of a large table is sketched while the one before travels. Elsewhere error
    feedback fills all rows in its own pass over v, and those of a small table travel together.

    Args, communication: see :mod:`hvd_sketch.exchange.candidates`.
    """

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device) -> None:
        self.predictor = ThresholdPredictor()
        self._config, self._comm, self._device = config, comm, device
        self._kernels = load_backend(None, device)
        self._coding = load_coding(self._kernels)
        self._sketch = CountSketch(dim, config.rows, config.cols, config.seed, shards=comm.size, device=device)
        self._step = 0

    @property
    def sketch(self) -> CountSketch | None:
        return None if self._overlaps else self._sketch

    @property
    def _overlaps(self) -> bool:
        return self._comm.overlaps and self._comm.size > 1 and self._config.table_bits == 32 and not self._is_small

    @property
    def _is_small(self) -> bool:
        return self._config.rows * self._config.cols <= CELLS_TOGETHER

    def begin(self, step: int) -> None:
        self._step = step
        self._sketch.zero_(step)

    def find(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        with self._comm.phase("sketch"):
            if self._config.table_bits < 32:
                summed = self._sum_in_few_bits(self._config.table_bits)
            elif self._is_small:
                summed = self._start_reduce_scatter(self._sketch.table.transpose(0, 1).contiguous()).wait()
            else:
                rows = self._sketch_rows(v, ranges) if self._overlaps else iter(self._sketch.table)
                summed = self._reduce_scatter_rows(rows)
        return self._choose(summed)

    def _sum_in_few_bits(self, bits: int) -> Tensor:
        """This rank's shard of the sum of all sketches, each rounded to few-bit codes: float32 [rows, cols // size].

        The rounding is stochastic, so that a cell of the sum is unbiased: see docs/design.md.
        """
        hash, size = self._sketch.hash, self._comm.size
        shards = self._sketch.table.transpose(0, 1).reshape(size * hash.rows, hash.shard_cols)
        dither = int(random_words(hash.seed, hash.step, Purpose.DITHER, self._comm.rank).random_raw()) >> 32
        arrived = self._comm.alltoall(self._kernels.quantize(shards, bits, dither).view(size, hash.rows, -1))
        return self._kernels.dequantize_sum(arrived, hash.shard_cols, bits)

    def _sketch_rows(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """The rows of the table, each when all of v has been added."""
        hash, table = self._sketch.hash, self._sketch.table
        for number, row in enumerate(table):
            for start, stop in ranges:
                self._kernels.accumulate_(hash, table, v[start:stop], start, range(number, number + 1))
            yield row

    def _reduce_scatter_rows(self, rows: Iterator[Tensor]) -> Tensor:
        """This rank's shard of the sum of all sketches: float32 [rows, cols // size]."""
        handles = [self._start_reduce_scatter(row) for row in one_behind(self._device, rows)]
        # The table is of no more use: a row's sum takes the place of rows that have arrived.
        summed = self._sketch.table.view(-1, self._sketch.hash.shard_cols)[: self._sketch.hash.rows]
        for row, handle in zip(summed, handles, strict=True):
            row.copy_(handle.wait())
        return summed

    def _start_reduce_scatter(self, row: Tensor) -> Handle:
        return self._comm.start_reduce_scatter(row)

    def _choose(self, summed: Tensor) -> Tensor:
        """Candidates from this rank's shard of the summed table. Communication: collective."""
        count = self._config.candidate_count(self._sketch.hash.dim)
        own_size = self._sketch.hash.owned_size(self._comm.rank)
        limit = min(KEPT_PER_CANDIDATE * ceil_div(count, self._comm.size) + KEPT_ALWAYS, own_size)
        estimates = ShardEstimates(self._kernels, self._sketch.hash, summed, self._comm.rank, limit)
        if not self._config.chooses:
            own_count = ceil_div(count * own_size, self._sketch.hash.dim)
            return self._allgather_candidates(self._own_largest(estimates, own_count, limit))
        threshold = self._find_threshold(estimates, count, self.predictor.lower_bound())
        self.predictor.update(threshold.edge)
        return self._allgather_candidates(estimates.above(threshold)[0])

    def _own_largest(self, estimates: ShardEstimates, count: int, limit: int) -> Tensor:
        """Positions of the ``count`` largest estimates of this rank's shard, ascending. Communication: none."""
        bound = self.predictor.lower_bound()
        if bound and not self._kernels.ON_HOST and 0 < count <= limit <= SORTED:
            found = largest_above(*estimates.first_above(bound), count)
            if found is not None:
                self.predictor.update(found[1])
                return found[0]
        threshold = _own_threshold(estimates, count, bound)
        self.predictor.update(threshold.edge)
        positions, values = estimates.above(threshold)
        if threshold.excess:  # equal estimates, of which coarse tables have many
            positions = positions[top_k(values, count, threshold.edge)]
        return positions

    def _find_threshold(self, estimates: Magnitudes, count: int, lower_bound: int = 0) -> Threshold:
        with self._comm.phase("select", self._device):
            return find_threshold(estimates, count, self._comm, lower_bound)

    def _allgather_candidates(self, positions: Tensor) -> Tensor:
        """The coordinates that all owners chose, from the positions that this one chose in its own order."""
        hash, rank = self._sketch.hash, self._comm.rank
        encoded = self._coding.encode_positions(positions, hash.owned_size(rank))
        with self._comm.phase("indices", self._device):
            gathered = self._comm.allgather(encoded)
            return self._coding.decode_owned(hash, gathered, self._device, (rank, encoded, positions))


def _own_threshold(estimates: Magnitudes, count: int, lower_bound: int) -> Threshold:
    """Of the ``count`` largest magnitudes of this rank's share. Communication: none."""

    def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
        counts = estimates.histogram(start, shift, bins)
        return counts, counts

    return search(look, count, lower_bound, exact=True)
