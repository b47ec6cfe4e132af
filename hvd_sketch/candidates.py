"""Candidate finding: which coordinates are worth an exact value. One replaceable step of the exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.coding import Shortlist, decode_shortlists, encode_shortlist
from hvd_sketch.config import SketchConfig
from hvd_sketch.feedback import Feedback
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.cpu import merge_owned
from hvd_sketch.selection import Cut, Expectation, Magnitudes, OwnedEstimates, VectorPart, find_cut
from hvd_sketch.sketch import CountSketch, fill_at_random, heavy_threshold, row_energies
from hvd_sketch.volume import MeteredTransport

# Estimates an owner may keep, in units of its share of the candidates; at the guess and above lie 1.1 to 1.6.
KEPT_PER_CANDIDATE = 2
KEPT_ALWAYS = 1 << 16


class CandidateSource(Protocol):
    """Takes in a gradient and names the coordinates whose exact sums are exchanged.

    Attributes:
        expected: what is known of the next step from those before. It saves messages and decides nothing.
    """

    expected: Expectation

    def find(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        """``u <- m * u + g``, ``v <- v + u``, then candidates for the summed v: int64, ascending, equal on all ranks.

        Args:
            feedback: this rank's u and v.
            parts: all of this rank's gradient, as (start, float32 [n]), in the order to work in.
            step: number of the step.

        Communication: collective, all ranks in the same order.
        """

    def sketch_ahead(self, feedback: Feedback, part: Tensor, start: int, step: int) -> None:
        """Do for a part what :meth:`find` can do before it writes u and v. Communication: none."""

    def forget_ahead(self) -> None:
        """Undo every :meth:`sketch_ahead` since the last :meth:`find`. Communication: none."""


class SketchCandidates:
    """Candidates from the summed Count Sketch (paper, Alg. 3, lines 1 to 4; Alg. 1 for HEAVYMIX).

    The table is summed by reduce_scatter: each rank holds the sum of the columns of its own shard only, and
    judges the coordinates that hash into them, alone. So no two ranks can disagree through rounding, and the
    time to recover falls with the number of ranks.
    """

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device | str) -> None:
        self._config = config
        self._comm = comm
        self._kernels = load_backend(None, torch.device(device))
        self._sketch = CountSketch(dim, config.rows, config.cols, config.seed, shards=comm.size, device=device)
        self._ahead_from = dim  # coordinates from here on are in the table already
        self.expected = Expectation()  # of the estimates chosen

    def find(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        summed = self._sum_sketches(feedback, parts, step)
        return self._heavymix(summed, step) if self._config.selection == "heavymix" else self._top_candidates(summed)

    def _sum_sketches(self, feedback: Feedback, parts: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
        """This rank's shard of the sum of all sketches: float32 [rows, cols // size]."""
        self._begin(step)
        row_by_row = self._comm.overlaps and self._comm.size > 1
        for start, part in parts:
            is_ahead = start >= self._ahead_from
            feedback.add_(part, start, None if is_ahead or row_by_row else self._sketch)
        handles = []
        with self._comm.phase("sketch"):
            for number, row in enumerate(self._sketch.table):
                if row_by_row:  # each is sketched while the one before travels
                    self._accumulate_row(number, feedback.v, parts)
                handles.append(self._comm.start_reduce_scatter(row))
            self.forget_ahead()
            # The table is of no more use: a row's sum takes the place of rows that have arrived.
            summed = self._sketch.table.view(-1, self._sketch.hash.shard_cols)[: self._sketch.hash.rows]
            for row, handle in zip(summed, handles, strict=True):
                row.copy_(handle.wait())
            return summed

    def _accumulate_row(self, row: int, v: Tensor, parts: Sequence[tuple[int, Tensor]]) -> None:
        for start, part in parts:
            if start < self._ahead_from:
                stop = start + part.numel()
                self._kernels.accumulate_(
                    self._sketch.hash, self._sketch.table, v[start:stop], start, range(row, row + 1)
                )

    def _begin(self, step: int) -> None:
        if self._ahead_from == self._sketch.hash.dim:
            self._sketch.zero_(step)

    def sketch_ahead(self, feedback: Feedback, part: Tensor, start: int, step: int) -> None:
        assert start + part.numel() == self._ahead_from, "parts come from the last to the first"
        self._begin(step)
        self._sketch.accumulate_(feedback.preview(part, start), start)
        self._ahead_from = start

    def forget_ahead(self) -> None:
        self._ahead_from = self._sketch.hash.dim

    def _top_candidates(self, summed: Tensor) -> Tensor:
        count = self._config.candidates(self._sketch.hash.dim)
        limit = KEPT_PER_CANDIDATE * -(-count // self._comm.size) + KEPT_ALWAYS
        estimates = OwnedEstimates(self._kernels, self._sketch.hash, summed, self._comm.rank, limit)
        cut = self._cut(estimates, count, self.expected.floor())
        self.expected.learn(cut)
        return self._tell_all(_shortlist(*estimates.above(cut), cut), cut)

    def _cut(self, estimates: Magnitudes, count: int, floor: int = 0) -> Cut:
        with self._comm.phase("select"):
            return find_cut(estimates, count, self._comm, floor)

    def _tell_all(self, own: Shortlist, cut: Cut) -> Tensor:
        """The coordinates that all owners chose together, from what this one takes."""
        encoded = encode_shortlist(own)
        with self._comm.phase("indices"):
            shortlists = decode_shortlists(self._comm.allgather(encoded), (self._comm.rank, encoded, own))
        dropped = cut.dropped([shortlist.values for shortlist in shortlists])
        chosen = [shortlist.without_(drop) for shortlist, drop in zip(shortlists, dropped, strict=True)]
        return merge_owned(self._sketch.hash, chosen).to(self._sketch.table.device, non_blocking=True)

    def _heavymix(self, summed: Tensor, step: int) -> Tensor:
        """H, the heavy coordinates, and others at random: k in all, the same on every rank."""
        k, hash = self._config.k, self._sketch.hash
        with self._comm.phase("norm"):
            energies = self._comm.allgather(row_energies(summed).unsqueeze(0))  # [size, rows]
        # fsum is exact, so that every rank has the same bits.
        norm = math.sqrt(np.median([math.fsum(row) for row in energies.T.tolist()]))
        where = hash, summed, self._comm.rank
        positions, estimates = self._kernels.owned_above(*where, heavy_threshold(norm, k), 0)
        heaviest = VectorPart(self._kernels, estimates)
        cut = self._cut(heaviest, k)
        chosen, values = heaviest.above(cut)
        heavy = self._tell_all(_shortlist(positions[chosen], values, cut), cut)
        return fill_at_random(heavy, k, hash.dim, self._config.seed, step)


def _shortlist(positions: Tensor, values: Tensor, cut: Cut) -> Shortlist:
    """What one owner takes, positions in its own order and estimates; on the CPU, where it is encoded."""
    doubtful = cut.doubtful(values, cut.own_doubtful)
    # Only the last copy waits for the device, and is never empty where another is not: then all have arrived.
    decisive = values.index_select(0, doubtful).to("cpu", non_blocking=True)
    doubtful = doubtful.to("cpu", non_blocking=True)
    return Shortlist(positions.to("cpu", torch.int64), doubtful, decisive)
