"""The ``count`` largest magnitudes of a vector that lies in parts on several ranks: a radix select.

Each level refines the threshold by ten or eleven of a float32's 31 magnitude bits from one histogram, summed
over the ranks as integers: exact, equal on every rank, 16 KiB in all, whatever the vector's length.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hvd_sketch.transport.base import Transport

LEVELS = ((21, 10), (11, 10), (0, 11))  # (shift, bits): 10 + 10 + 11 = 31 magnitude bits
HISTOGRAM_BYTES = 4 * sum(2**bits for _, bits in LEVELS)


def select_largest(kernels: ModuleType, values: Tensor, count: int, comm: Transport) -> Tensor:
    """Positions, in this rank's part, of the ``count`` largest magnitudes over all ranks.

    Exactly ``min(count, number of non-zero values)`` are chosen over all ranks. Equal magnitudes at the
    threshold are dealt out by (rank, position). Infinities and NaN count as the largest.

    Communication: collective; at most three allreduces of integer histograms and, where ties are dealt out,
    one allgather of a count. All ranks see the same sums and so issue the same collectives.

    Args:
        kernels: a backend with ``magnitude_histogram`` and ``select_above``.
        values: float32 [n], this rank's part; may be empty.
        count: how many over all ranks, at least 0.
        comm: the ranks that hold the parts.

    Returns:
        int64, ascending.
    """
    threshold, wanted = 0, count
    own = total = torch.zeros(1, dtype=torch.int64)
    bin_ = 0
    for shift, bits in LEVELS:
        own = kernels.magnitude_histogram(values, threshold, shift, bits).cpu()
        total = _sum_counts(own, count, comm)
        from_top = total.flip(0).cumsum(0)
        if int(from_top[-1]) <= wanted:  # all that is left under this prefix is wanted
            return kernels.select_above(values, max((threshold << (shift + bits)) - 1, 0), 0)
        rank_of_bin = int(torch.searchsorted(from_top, wanted)) if wanted else 0
        bin_ = len(total) - 1 - rank_of_bin
        wanted -= int(from_top[rank_of_bin] - total[bin_])
        threshold = (threshold << bits) | bin_
    return kernels.select_above(values, threshold, _share_of_ties(int(own[bin_]), wanted, int(total[bin_]), comm))


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
