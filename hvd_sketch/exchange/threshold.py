"""The ``count`` largest magnitudes of a vector that lies in parts on several ranks.

The ranks sum a histogram of magnitudes, as integers: exact, and equal on every rank. It tells in which bin the
``count``-th largest lies. Bins are so fine, and so few, that sending all that lies in that one bin, and letting
everybody drop what is too much, costs about as many bytes as the histogram. Where a guess at the threshold is at
hand, from the step before, one histogram of 16 to 2,048 bins is enough; without it two or three are.

The vector need not exist: :class:`OwnedEstimates` computes it from the table whenever it is looked at, and with
the guess it is looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.transport.base import Transport

MAGNITUDE_BITS = 31
OCTAVE = 1 << 23  # magnitude bits from one power of two to the next
# The threshold may be 1.5 to 3 % lower than expected before the guess fails. Where noise prevails, as it does at 50
# coordinates per column, there are 1.1 to 1.6 times as many estimates above the guess as above the threshold.
FLOOR_MARGIN = 1 << 18
# How many values may lie in the threshold's bin, and beside that in units of bins: with fewer, another histogram would
# take longer than they do. Of normal noise at 2 to 3 deviations a bin of an octave's holds four to six times as many.
ALWAYS_IN_LAST_BIN = 64
IN_LAST_BIN_PER_BIN = 8


class Magnitudes(Protocol):
    """One rank's part of the vector."""

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        """As :func:`hvd_sketch.kernels.reference.magnitude_histogram`, on the CPU."""

    def above(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Positions of what this rank takes, ascending, and the values there.

        The cut was found after the last :meth:`histogram`.
        """


class VectorPart:
    """A part that lies in memory: ``values``, float32 [n], may be empty."""

    def __init__(self, kernels: ModuleType, values: Tensor) -> None:
        self._kernels, self._values = kernels, values

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        return self._kernels.magnitude_histogram(self._values, start, shift, bins).cpu()

    def above(self, cut: Cut) -> tuple[Tensor, Tensor]:
        positions = self._kernels.select_above(self._values, cut.threshold, cut.ties, cut.taken)
        return positions, self._values.index_select(0, positions)


class OwnedEstimates:
    """The estimates of one shard's coordinates in its owner's order, never written out.

    Where those worth a look are few, they are kept, 12 bytes each, and the table is not looked at again.

    Args:
        kernels: a backend.
        hash, shard_table, shard: as for :func:`hvd_sketch.kernels.reference.owned_above`.
        limit: how many may be kept.
    """

    def __init__(self, kernels: ModuleType, hash: BlockHash, shard_table: Tensor, shard: int, limit: int) -> None:
        self._kernels, self._where = kernels, (hash, shard_table, shard)
        self._limit = limit
        self._kept: tuple[Tensor, Tensor] | None = None  # positions and estimates at and above _floor
        self._floor = 0

    def histogram(self, start: int, shift: int, bins: int) -> Tensor:
        window = start, shift, bins
        if self._kept is not None and start >= self._floor:
            return self._kernels.magnitude_histogram(self._kept[1], *window).cpu()
        self._kept = None
        if start == 0:
            return self._kernels.owned_histogram(*self._where, *window).cpu()
        counts, kept = self._kernels.owned_histogram_kept(*self._where, *window, self._limit)
        counts = counts.cpu()
        if int(counts.sum()) <= self._limit:
            self._kept, self._floor = kept, start
        return counts

    def above(self, cut: Cut) -> tuple[Tensor, Tensor]:
        wanted = cut.threshold, cut.ties, cut.taken
        if self._kept is None:
            return self._kernels.owned_above(*self._where, *wanted)
        kept, self._kept = self._kept, None
        return self._kernels.keep_above(*kept, *wanted)


@dataclass(frozen=True)
class Cut:
    """Where the ``count`` largest end; equal on all ranks, but for what this rank takes.

    Attributes:
        threshold: magnitude bits; what lies above is taken.
        taken: how many values this rank takes, with ...
        ties: ... so many of those equal to the threshold and ...
        own_doubtful: ... so many of the doubtful.
        doubtful_to: magnitude bits; what is taken up to and with it may be ...
        surplus: ... one of so many that are taken over all ranks though they are not among the ``count`` largest.
    """

    threshold: int
    taken: int
    ties: int = 0
    own_doubtful: int = 0
    doubtful_to: int = 0
    surplus: int = 0

    def doubtful(self, values: Tensor, size: int | None = None) -> Tensor:
        """Which of the values taken, float32 [n], may have to be dropped: positions, int64 ascending.

        ``size``: how many those are, where it is known.
        """
        if not self.surplus:
            return torch.empty(0, dtype=torch.int64, device=values.device)
        return load_backend(None, values.device).select_upto(values, self.doubtful_to, size)

    def dropped(self, doubtful: Sequence[Tensor]) -> list[Tensor]:
        """Which of every rank's doubtful values, float32 [n] each, are to be dropped: bool [n] each.

        Of equal ones the last, in the order of (rank, position). Communication: none.
        """
        magnitudes = _magnitudes(torch.cat(list(doubtful)))
        order = torch.sort(magnitudes, descending=True, stable=True).indices
        dropped = torch.zeros_like(magnitudes, dtype=torch.bool)
        dropped[order[len(order) - self.surplus :]] = True
        return list(dropped.split([values.numel() for values in doubtful]))

    def unwanted(self, values: Tensor) -> Tensor:
        """Which of all ranks' values, float32 [n] in rank order, are the surplus: positions, int64, ascending.

        Communication: none.
        """
        doubtful = self.doubtful(values)
        return doubtful[self.dropped([values[doubtful]])[0]]


class Expectation:
    """Of the next threshold in a series of similar vectors, from the last two. Equal on all ranks.

    Attributes:
        thresholds: the last and the one before, as magnitude bits; zeros at first.
    """

    def __init__(self) -> None:
        self.thresholds = 0, 0

    def learn(self, cut: Cut) -> None:
        self.thresholds = cut.threshold, self.thresholds[0]

    def floor(self) -> int:
        """Magnitude bits that the threshold will hardly be below; 0: anything may be.

        A fall is expected to go on, half a rise: residuals grow fast in a training's first steps.
        """
        last, before = self.thresholds
        rise = last - before if before else 0
        return min(max(last + min(rise, rise // 2) - FLOOR_MARGIN, 0), MAGNITUDE_MASK)


def histogram_bins(count: int) -> int:
    """How many bins to look for the ``count``-th largest with: a power of two near the root of ``count``."""
    return 1 << min(max((count.bit_length() + 1) // 2, 4), 11)


def find_cut(part: Magnitudes, count: int, comm: Transport, floor: int = 0) -> Cut:
    """Where the ``count`` largest magnitudes over all ranks end.

    The values taken are exactly ``min(count, number of non-zero values)`` and ``surplus``, all in one bin. Those
    that remain do not depend on ``floor``. Infinities and NaN count as the largest.

    Communication: collective; one allreduce of an integer histogram where ``floor`` is near, two or three otherwise.
    Where many are equal up to nine, and an allgather of a count. All ranks see the same sums and so issue the same
    collectives.

    Args:
        part: this rank's part.
        count: how many over all ranks, at least 0.
        comm: the ranks that hold the parts.
        floor: a guess, the same on every rank, below which no value need be looked at; see :class:`Expectation`.
    """
    if count == 0:
        return Cut(MAGNITUDE_MASK, taken=0)
    bins = histogram_bins(count)
    bin_bits = bins.bit_length() - 1
    start, shift = floor, (OCTAVE // bins).bit_length() - 1 if floor else MAGNITUDE_BITS - bin_bits
    while True:
        own = part.histogram(start, shift, bins)
        at_least = _sum_counts(own, count, comm).flip(0).cumsum(0).flip(0)  # values from each bin's edge upwards
        if start == 0 and int(at_least[0]) <= count:
            return Cut(0, taken=int(own.sum()))
        if int(at_least[0]) < count:
            start, shift = 0, MAGNITUDE_BITS - bin_bits  # the guess was too high
            continue
        bin = int((at_least >= count).sum()) - 1
        edge, surplus = start + (bin << shift), int(at_least[bin]) - count
        if bin == bins:  # the guess was too low
            start, shift = edge, MAGNITUDE_BITS - bin_bits
            continue
        inside = int(at_least[bin] - at_least[bin + 1])
        own_inside, own_beyond = int(own[bin]), int(own[bin + 1 :].sum())
        if surplus == 0 or inside <= ALWAYS_IN_LAST_BIN + bins * IN_LAST_BIN_PER_BIN:
            doubtful_to = min(edge + (1 << shift) - 1, MAGNITUDE_MASK)
            return Cut(edge - 1, own_beyond + own_inside, 0, own_inside, doubtful_to, surplus)
        if shift == 0:
            ties = _share_of_ties(own_inside, inside - surplus, comm)
            return Cut(edge, own_beyond + ties, ties)
        start, shift = edge, max(shift - bin_bits, 0)


def select_largest(part: Magnitudes, count: int, comm: Transport, floor: int = 0) -> Tensor:
    """Positions, in this rank's part, of the ``count`` largest magnitudes over all ranks: int64, ascending.

    Exactly ``min(count, number of non-zero values)`` are chosen over all ranks. Equal magnitudes at the threshold
    are dealt out by (rank, position).

    Communication: collective; that of :func:`find_cut`, and up to two allgathers. Args: the same.
    """
    cut = find_cut(part, count, comm, floor)
    positions, values = part.above(cut)
    if not cut.surplus:
        return positions
    doubtful = cut.doubtful(values, cut.own_doubtful)
    sizes = comm.allgather(torch.tensor([doubtful.numel()])).tolist()
    dropped = cut.dropped(comm.allgather(values[doubtful]).split(sizes))[comm.rank]
    keep = torch.ones_like(positions, dtype=torch.bool)
    keep[doubtful[dropped]] = False
    return positions[keep]


def _magnitudes(values: Tensor) -> Tensor:
    return values.view(torch.int32) & MAGNITUDE_MASK


def _sum_counts(own: Tensor, count: int, comm: Transport) -> Tensor:
    """Sum over ranks, int64. Sent as int32: a bin capped at a rank's share of 2^31 still exceeds ``count``."""
    cap = (2**31 - 1) // comm.size
    if count >= cap:
        return comm.allreduce_(own.clone())
    return comm.allreduce_(own.clamp(max=cap).to(torch.int32)).to(torch.int64)


def _share_of_ties(own: int, wanted: int, comm: Transport) -> int:
    """How many of this rank's ``own`` values equal to the threshold are taken when ``wanted`` are in all."""
    ties = comm.allgather(torch.tensor([own])).tolist()
    before = sum(ties[: comm.rank])
    return min(max(wanted - before, 0), own)
