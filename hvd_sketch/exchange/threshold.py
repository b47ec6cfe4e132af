"""The ``count`` largest magnitudes of a vector of which every rank holds a share.

The ranks sum a histogram of magnitudes, as integers: exact, and equal on every rank. The vector need not exist in
memory: :class:`ShardEstimates` computes its share from the table whenever it is looked at.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.kernels.selection import OCTAVE, Threshold, search
from hvd_sketch.transport.base import Transport

# The threshold may be 1.5 to 3 % lower than predicted before the bound fails. Where noise prevails, as it does at 50
# coordinates per column, there are 1.1 to 1.6 times as many estimates above the bound as above the threshold.
BOUND_MARGIN = 1 << 18
# Where it has failed, the threshold is probably not much lower: one histogram from here upwards reaches it.
SECOND_MARGIN = OCTAVE // 4


class Magnitudes(Protocol):
    """One rank's share of a vector."""

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        """As :func:`hvd_sketch.kernels.reference.magnitude_histogram`, on the CPU."""

    def above(self, threshold: Threshold) -> tuple[Tensor, Tensor]:
        """Positions of what this rank takes, ascending, and the values there.

        The threshold was found after the last :meth:`histogram`.
        """


class LocalValues:
    """A share that is in memory.

    Args:
        kernels: a backend.
        values: float32 [n]; n may be 0.
    """

    def __init__(self, kernels: ModuleType, values: Tensor) -> None:
        self._kernels, self._values = kernels, values

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        return self._kernels.magnitude_histogram(self._values, start, shift, bins).cpu()

    def above(self, threshold: Threshold) -> tuple[Tensor, Tensor]:
        positions = self._kernels.select_above(self._values, threshold.edge - 1, threshold.own)
        return positions, self._values.index_select(0, positions)


class ShardEstimates:
    """The estimates of one shard's coordinates in its owner's order, never written out.

    Where few are worth a look, those are kept, 12 bytes each, and the table is not looked at again.

    Args:
        kernels: a backend.
        hash, shard_table, shard: as for :func:`hvd_sketch.kernels.reference.owned_above`.
        limit: how many may be kept.
    """

    def __init__(self, kernels: ModuleType, hash: BlockHash, shard_table: Tensor, shard: int, limit: int) -> None:
        self._kernels, self._where = kernels, (hash, shard_table, shard)
        self._limit = limit
        self._kept: tuple[Tensor, Tensor] | None = None  # positions and estimates from _kept_from upwards
        self._kept_from = 0

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        window = start, shift, bins
        if self._kept is not None and start >= self._kept_from:
            return self._kernels.magnitude_histogram(self._kept[1], *window).cpu()
        self._kept = None
        if start == 0:
            return self._kernels.owned_histogram(*self._where, *window).cpu()
        counts, kept = self._kernels.owned_histogram_kept(*self._where, *window, self._limit)
        counts = counts.cpu()
        if int(counts.sum()) <= self._limit:
            self._kept, self._kept_from = kept, start
        return counts

    def first_above(self, bound: int) -> tuple[Tensor, Tensor]:
        """Of the estimates with magnitude bits from ``bound`` upwards the first ``limit``, with zeros behind them.

        On a device, for which this does not wait.
        """
        return self._kernels.owned_above(*self._where, bound - 1, self._limit)

    def above(self, threshold: Threshold) -> tuple[Tensor, Tensor]:
        wanted = threshold.edge - 1, threshold.own
        if self._kept is None:
            return self._kernels.owned_above(*self._where, *wanted)
        kept, self._kept = self._kept, None
        return self._kernels.keep_above(*kept, *wanted)


class ThresholdPredictor:
    """Bounds the next threshold of a series of similar vectors, from the last two. Equal on all ranks.

    The prediction saves messages and decides nothing.

    Attributes:
        edges: the last and the one before, as magnitude bits; zeros at first.
    """

    def __init__(self) -> None:
        self.edges = 0, 0

    def update(self, edge: int) -> None:
        """Take in the magnitude bits that were found."""
        self.edges = edge, self.edges[0]

    def lower_bound(self) -> int:
        """Magnitude bits that the threshold will hardly be below; 0: it may be anything.

        A fall is expected to go on, half a rise: residuals grow fast in a training's first steps.
        """
        last, before = self.edges
        rise = last - before if before else 0
        return min(max(last + min(rise, rise // 2) - BOUND_MARGIN, 0), MAGNITUDE_MASK)


def find_threshold(own: Magnitudes, count: int, comm: Transport, lower_bound: int = 0) -> Threshold:
    """Where the ``count`` largest magnitudes over all ranks end; see :func:`hvd_sketch.kernels.selection.search`.

    Communication: collective; one allreduce of an integer histogram where ``lower_bound`` is near, two or three
    otherwise, up to nine where many values are equal. All ranks see the same sums and issue the same collectives.

    Args:
        own: this rank's share.
        count: how many over all ranks, at least 0.
        comm: the ranks that hold the shares.
        lower_bound: magnitude bits that the threshold is hardly below; equal on all ranks.
    """

    def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
        counts = own.histogram(start, shift, bins)
        return counts, _sum_counts(counts, count, comm)

    return search(look, count, lower_bound)


def _sum_counts(own: Tensor, count: int, comm: Transport) -> Tensor:
    """Sum over ranks, int64. Sent as int32: a bin capped at a rank's share of 2^31 still exceeds ``count``."""
    cap = (2**31 - 1) // comm.size
    if count >= cap:
        return comm.allreduce_(own.clone())
    return comm.allreduce_(own.clamp(max=cap).to(torch.int32)).to(torch.int64)
