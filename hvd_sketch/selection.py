"""The ``count`` largest magnitudes of a vector that lies in parts on several ranks: a radix select.

Each level refines the threshold by ten or eleven of a float32's 31 magnitude bits from one histogram, summed
over the ranks as integers: exact, equal on every rank, 16 KiB in all, whatever the vector's length.

The vector need not exist: :class:`OwnedEstimates` computes it from the table whenever it is looked at, and a
guess at the threshold, from the step before, makes one look enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.transport.base import Transport

# (shift, bits): 11 + 10 + 10 = 31 magnitude bits. The first level's bins are an eighth of a power of two wide, so
# that hardly more than ``count`` values lie in and above the threshold's.
LEVELS = ((20, 11), (10, 10), (0, 10))
HISTOGRAM_BYTES = 4 * sum(2**bits for _, bits in LEVELS)
# The threshold may be 3 to 6 % lower than expected before the guess fails. Where noise prevails, as it does at 50
# coordinates per column, there are 1.1 to 1.6 times as many estimates above the guess as above the threshold.
FLOOR_MARGIN = 1 << 18


class Magnitudes(Protocol):
    """One rank's part of the vector."""

    def histogram(self, prefix: int, shift: int, bits: int, floor: int = 0) -> Tensor:
        """As :func:`hvd_sketch.kernels.reference.magnitude_histogram`; bins below ``floor`` need not be right."""

    def above(self, threshold: int, ties: int) -> Tensor:
        """As :func:`hvd_sketch.kernels.reference.select_above`, within what was asked for last."""


class VectorPart:
    """A part that lies in memory: ``values``, float32 [n], may be empty."""

    def __init__(self, kernels: ModuleType, values: Tensor) -> None:
        self._kernels, self._values = kernels, values

    def histogram(self, prefix: int, shift: int, bits: int, floor: int = 0) -> Tensor:
        return self._kernels.magnitude_histogram(self._values, prefix, shift, bits)

    def above(self, threshold: int, ties: int) -> Tensor:
        return self._kernels.select_above(self._values, threshold, ties)


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

    def histogram(self, prefix: int, shift: int, bits: int, floor: int = 0) -> Tensor:
        self._keep_from(max(floor, prefix << (shift + bits)))
        if self._kept is not None:
            return self._kernels.magnitude_histogram(self._kept[1], prefix, shift, bits)
        return self._kernels.owned_histogram(*self._where, prefix, shift, bits)

    def above(self, threshold: int, ties: int) -> Tensor:
        if self._kept is not None:
            positions, estimates = self._kept
            return positions[self._kernels.select_above(estimates, threshold, ties)]
        hash, _, shard = self._where
        return self._kernels.owned_above(*self._where, threshold, ties, hash.owned_size(shard))[0]

    def _keep_from(self, floor: int) -> None:
        if floor < self._floor:
            self._kept = None
        if floor and self._kept is None:
            self._kept, self._floor = self._kernels.owned_above(*self._where, floor - 1, 0, self._limit), floor


@dataclass(frozen=True)
class Largest:
    """What :func:`select_largest` chose.

    Attributes:
        positions: int64, ascending, in this rank's part.
        threshold: magnitude bits of the least that is chosen, equal on all ranks; 0 where all are.
    """

    positions: Tensor
    threshold: int


def expected_floor(threshold: int, before: int) -> int:
    """A ``floor`` for the next of a series of similar vectors, from the thresholds of the last two.

    A fall is expected to go on, half a rise: residuals grow fast in a training's first steps.
    """
    shift, _ = LEVELS[0]
    rise = threshold - before if before else 0
    return max(threshold + min(rise, rise // 2) - FLOOR_MARGIN, 0) >> shift << shift


def select_largest(part: Magnitudes, count: int, comm: Transport, floor: int = 0) -> Largest:
    """Positions, in this rank's part, of the ``count`` largest magnitudes over all ranks.

    Exactly ``min(count, number of non-zero values)`` are chosen over all ranks. Equal magnitudes at the
    threshold are dealt out by (rank, position). Infinities and NaN count as the largest. The choice does not
    depend on ``floor``.

    Communication: collective; at most three allreduces of integer histograms, one more where ``floor`` was too
    high, and, where ties are dealt out, one allgather of a count. All ranks see the same sums and so issue the
    same collectives.

    Args:
        part: this rank's part.
        count: how many over all ranks, at least 0.
        comm: the ranks that hold the parts.
        floor: a guess, the same on every rank, below which no value need be looked at; see :func:`expected_floor`.
    """
    threshold, wanted = 0, count
    own, total = _first_histogram(part, count, comm, floor)
    for level, (shift, bits) in enumerate(LEVELS):
        if level:
            own = part.histogram(threshold, shift, bits).cpu()
            total = _sum_counts(own, count, comm)
        from_top = total.flip(0).cumsum(0)
        if int(from_top[-1]) <= wanted:  # all that is left under this prefix is wanted
            return Largest(part.above(max((threshold << (shift + bits)) - 1, 0), 0), 0)
        rank_of_bin = int(torch.searchsorted(from_top, wanted)) if wanted else 0
        bin_ = len(total) - 1 - rank_of_bin
        wanted -= int(from_top[rank_of_bin] - total[bin_])
        threshold = (threshold << bits) | bin_
    ties = _share_of_ties(int(own[bin_]), wanted, int(total[bin_]), comm)
    return Largest(part.above(threshold, ties), threshold)


def _first_histogram(part: Magnitudes, count: int, comm: Transport, floor: int) -> tuple[Tensor, Tensor]:
    """This rank's counts and their sum on the first level, right in and above the threshold's bin."""
    shift, bits = LEVELS[0]
    own = part.histogram(0, shift, bits, floor).cpu()
    total = _sum_counts(own, count, comm)
    if floor and int(total[floor >> shift :].sum()) <= count:  # the threshold may be lower
        return _first_histogram(part, count, comm, 0)
    return own, total


def _sum_counts(own: Tensor, count: int, comm: Transport) -> Tensor:
    """Sum over ranks, int64. Sent as int32: a bin capped at a rank's share of 2^31 still exceeds ``count``."""
    cap = (2**31 - 1) // comm.size
    if count > cap:
        return comm.allreduce_(own.clone())
    return comm.allreduce_(own.clamp(max=cap).to(torch.int32)).to(torch.int64)


def _share_of_ties(own: int, wanted: int, total: int, comm: Transport) -> int:
    """How many of this rank's ``own`` ties at the threshold are taken when ``wanted`` of ``total`` are."""
    if wanted == total:
        return own
    ties = comm.allgather(torch.tensor([own])).tolist()
    before = sum(ties[: comm.rank])
    return min(max(wanted - before, 0), own)
