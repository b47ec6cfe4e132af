"""Candidate finding: which coordinates are worth an exact value. One replaceable step of the exchange."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.coding import load_coding
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.feedback import Feedback
from hvd_sketch.exchange.threshold import LocalValues, Magnitudes, ShardEstimates, ThresholdPredictor, find_threshold
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import Threshold
from hvd_sketch.sketch import CountSketch, fill_at_random, heavy_threshold, row_energies
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.staging import one_behind

# Estimates an owner may keep, in units of its share of the candidates; at the guess and above lie 1.1 to 1.6.
KEPT_PER_CANDIDATE = 2
KEPT_ALWAYS = 1 << 16


class CandidateSource(Protocol):
    """Takes in a gradient and names the coordinates whose exact sums are exchanged.

    Attributes:
        predictor: bounds the next step's threshold by those before. It saves messages and decides nothing.
    """

    predictor: ThresholdPredictor

    def find(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        """``u <- m * u + g``, ``v <- v + u``, then candidates for the summed v: int64, ascending, equal on all ranks.

        Args:
            feedback: this rank's u and v.
            parts: all of this rank's gradient, as (start, float32 [n]), in the order to work in.
            step: number of the step.

        Communication: collective, all ranks in the same order.
        """


class SketchCandidates:
    """Candidates from the summed Count Sketch (paper, Alg. 3, lines 1 to 4; Alg. 1 for HEAVYMIX).

    The table is summed by reduce_scatter: each rank holds the sum of the columns of its own shard only, and
    judges the coordinates that hash into them, alone. So no two ranks can disagree through rounding, and the
    time to recover falls with the number of ranks.
    """

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device | str) -> None:
        self._config = config
        self._comm = comm
        self._device = torch.device(device)
        self._kernels = load_backend(None, self._device)
        self._coding = load_coding(self._kernels)
        self._sketch = CountSketch(dim, config.rows, config.cols, config.seed, shards=comm.size, device=device)
        self.predictor = ThresholdPredictor()  # of the estimates chosen

    def find(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        summed = self._sum_sketches(feedback, parts, step)
        return self._heavymix(summed, step) if self._config.selection == "heavymix" else self._top_candidates(summed)

    def _sum_sketches(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        """This rank's shard of the sum of all sketches: float32 [rows, cols // size]."""
        self._sketch.zero_(step)
        row_by_row = self._comm.overlaps and self._comm.size > 1
        for start, part in parts:
            feedback.add_(part, start, None if row_by_row else self._sketch)
        # Each is sketched while the one before travels.
        rows = self._rows_sketched(feedback.v, parts) if row_by_row else iter(self._sketch.table)
        with self._comm.phase("sketch"):
            handles = [self._comm.start_reduce_scatter(row) for row in one_behind(self._device, rows)]
            # The table is of no more use: a row's sum takes the place of rows that have arrived.
            summed = self._sketch.table.view(-1, self._sketch.hash.shard_cols)[: self._sketch.hash.rows]
            for row, handle in zip(summed, handles, strict=True):
                row.copy_(handle.wait())
            return summed

    def _rows_sketched(self, v: Tensor, parts: Sequence[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """The rows of the table, each when all of v has been added."""
        hash, table = self._sketch.hash, self._sketch.table
        for number, row in enumerate(table):
            for start, part in parts:
                values = v[start : start + part.numel()]
                self._kernels.accumulate_(hash, table, values, start, range(number, number + 1))
            yield row

    def _top_candidates(self, summed: Tensor) -> Tensor:
        count = self._config.candidates(self._sketch.hash.dim)
        limit = KEPT_PER_CANDIDATE * -(-count // self._comm.size) + KEPT_ALWAYS
        estimates = ShardEstimates(self._kernels, self._sketch.hash, summed, self._comm.rank, limit)
        threshold = self._find_threshold(estimates, count, self.predictor.lower_bound())
        self.predictor.update(threshold)
        return self._allgather_candidates(estimates.above(threshold)[0])

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

    def _heavymix(self, summed: Tensor, step: int) -> Tensor:
        """H, the heavy coordinates, and others at random: k in all, the same on every rank."""
        k, hash = self._config.k, self._sketch.hash
        with self._comm.phase("norm"):
            energies = self._comm.allgather(row_energies(summed).unsqueeze(0))  # [size, rows]
        # fsum is exact, so that every rank has the same bits.
        norm = math.sqrt(np.median([math.fsum(row) for row in energies.T.tolist()]))
        where = hash, summed, self._comm.rank
        positions, estimates = self._kernels.owned_above(*where, heavy_threshold(norm, k))
        threshold = self._find_threshold(LocalValues(self._kernels, estimates), k)
        edge = threshold.upper if threshold.excess else threshold.edge  # at most k are heavy
        heavy = self._allgather_candidates(positions[self._kernels.select_above(estimates, edge - 1)])
        return fill_at_random(heavy, k, hash.dim, self._config.seed, step)
