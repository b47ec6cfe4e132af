"""Fewer points of a long series, without losing what stands out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BUCKETS = 200
Numbers = NDArray[np.float64]


def peaks(y: Numbers, buckets: int = BUCKETS) -> NDArray[np.int64]:
    """Which points of a series to draw: of each bucket the lowest and the highest; and the first and the last.

    Args:
        y: [n], finite.
        buckets: of equally many points; as many more, of more and more points, for logarithmic axes.

    Returns:
        int64, ascending, at most ``4 * buckets + 2``; all where there are not more.
    """
    count = len(y)
    if count <= 4 * buckets + 2:
        return np.arange(count)
    starts = {*np.linspace(0, count, buckets + 1).astype(int), *np.geomspace(1, count, buckets).astype(int)}
    kept = {0, count - 1}
    for start, stop in pairwise(sorted(starts)):
        part = y[start:stop]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))


def sums(y: Numbers, buckets: int = BUCKETS) -> Numbers:
    """Sums over buckets of a series [..., n] along its last axis: [..., at most ``buckets``]."""
    return np.add.reduceat(y, _starts(y.shape[-1], buckets), axis=-1)


def ends(count: int, buckets: int = BUCKETS) -> NDArray[np.int64]:
    """The last point of each bucket of :func:`sums`."""
    return np.append(_starts(count, buckets)[1:], count) - 1


def _starts(count: int, buckets: int) -> NDArray[np.int64]:
    buckets = min(count, buckets)
    return np.linspace(0, count, buckets + 1).astype(np.int64)[:-1]
