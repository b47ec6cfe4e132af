"""The threshold of the ``count`` largest magnitudes, found by histograms, of a vector in memory or in shares of ranks.

A magnitude is a float32's bits without the sign: these integers have the order of the absolute values. Thresholds are
on a fixed grid of 16 to 2,048 bins per power of two. All values from the edge of a bin upwards are taken: more than
``count`` by a few per cent, or less where the grid is fine. One histogram is enough with a lower bound on the threshold
from the previous step, otherwise two or three are needed. The result does not depend on the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.reference import MAGNITUDE_MASK

MAGNITUDE_BITS = 31
OCTAVE = 1 << 23  # magnitude bits from one power of two to the next
# More values in the boundary bin make the grid finer there: many equal values would all be taken. In units of
# ``count / bins``, a bin has four to six values of normal noise at 2 to 3 deviations, up to twelve noisy estimates.
ALWAYS_IN_BOUNDARY_BIN = 64
IN_BOUNDARY_BIN_PER_BIN = 4

# Of at most so many values on a device the k largest are found by sorting, in half a millisecond and with one wait for
# the device: each histogram of a search has one of its own.
SORTED = 1 << 22

# From (start, shift, bins) to two histograms, of this rank and summed over all; see reference.magnitude_histogram.
Look = Callable[[int, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Threshold:
    """The threshold of the ``count`` largest magnitudes; equal on all ranks, except ``own``.

    Attributes:
        edge: magnitude bits; all values from there upwards are taken, zeros never.
        upper: magnitude bits where the boundary bin ends. The ``count``-th largest value is in the boundary bin.
        excess: how many more than ``count`` are taken over all ranks, all of them in the boundary bin.
        own: how many this rank takes.
    """

    edge: int
    upper: int
    excess: int
    own: int


def histogram_bins(count: int) -> int:
    """How many bins per power of two: near twice the root of ``count``.

    There a histogram of twice as many bins costs the bytes that it saves in values beyond ``count``.
    """
    return 1 << min(max((count.bit_length() + 3) // 2, 4), 11)


def looks(count: int) -> int:
    """How many histograms :func:`search` takes where it has no lower bound and few values are equal."""
    exponent_bits = MAGNITUDE_BITS - (OCTAVE.bit_length() - 1)
    return 1 + ceil_div(exponent_bits, histogram_bins(count).bit_length() - 1)


def search(look: Look, count: int, lower_bound: int = 0, exact: bool = False) -> Threshold:
    """The highest edge of the grid with at least ``count`` non-zero values from it upwards; 0 if there are fewer.

    Infinities and NaN count as the largest.

    Args:
        look: makes the histograms.
        count: how many values, at least 0.
        lower_bound: magnitude bits, probably below the threshold; equal on all ranks. A wrong bound costs more looks.
        exact: look until nothing but equal magnitudes is in excess.
    """
    if count == 0:
        return Threshold(MAGNITUDE_MASK + 1, MAGNITUDE_MASK + 1, excess=0, own=0)
    bins = histogram_bins(count)
    bin_bits = bins.bit_length() - 1
    grid = (OCTAVE // bins).bit_length() - 1
    coarse = MAGNITUDE_BITS - bin_bits
    start, shift = (lower_bound >> grid << grid, grid) if lower_bound else (0, coarse)
    while True:
        own, total = look(start, shift, bins)
        at_least = total.flip(0).cumsum(0).flip(0)  # values from each bin's edge upwards
        if start == 0 and int(at_least[0]) <= count:
            return Threshold(0, 0, excess=0, own=int(own.sum()))
        if int(at_least[0]) < count:
            start, shift = 0, coarse  # the lower bound was too high
            continue
        bin = int((at_least >= count).sum()) - 1
        edge, excess = start + (bin << shift), int(at_least[bin]) - count
        if bin == bins:  # the lower bound was too low
            start, shift = edge, coarse
            continue
        is_crowded = int(at_least[bin] - at_least[bin + 1]) > ALWAYS_IN_BOUNDARY_BIN + bins * IN_BOUNDARY_BIN_PER_BIN
        is_fine = shift == 0 or excess == 0 or not (is_crowded or exact)
        if is_fine and (shift <= grid or exact):
            return Threshold(edge, edge + (1 << shift), excess, own=int(own[bin:].sum()))
        start, shift = edge, max(shift - bin_bits, grid if shift > grid else 0)


def top_k(values: Tensor, k: int, lower_bound: int = 0) -> Tensor:
    """Positions of the k largest magnitudes of float32 [n], contiguous: int64, ascending, on the device of ``values``.

    Exactly ``min(k, number of non-zero values)``. Of equal magnitudes the lower position is chosen. Infinities and NaN
    count as the largest. A ``lower_bound`` on the magnitude bits of the k-th saves a look. Communication: none.
    """
    kernels = load_backend(None, values.device)
    if not kernels.ON_HOST and values.numel() <= SORTED:
        magnitudes = values.view(torch.int32) & MAGNITUDE_MASK
        ordered, positions = magnitudes.sort(descending=True, stable=True)
        return positions[:k][ordered[:k] > 0].sort().values

    def look(start: int, shift: int, bins: int) -> tuple[Tensor, Tensor]:
        counts = kernels.magnitude_histogram(values, start, shift, bins).cpu()
        return counts, counts

    threshold = search(look, k, lower_bound, exact=True)
    positions = kernels.select_above(values, threshold.edge - 1, threshold.own)
    if not threshold.excess:
        return positions
    ties = (values.index_select(0, positions).view(torch.int32) & MAGNITUDE_MASK == threshold.edge).nonzero().flatten()
    keep = torch.ones_like(positions, dtype=torch.bool)
    keep[ties[len(ties) - threshold.excess :]] = False
    return positions[keep]
