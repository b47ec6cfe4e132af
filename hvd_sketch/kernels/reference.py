"""The sketch kernels in plain NumPy: slow, readable, and the truth every other backend is tested against.

A backend is a module with these functions. Tensors are float32 and contiguous, on the backend's
device; ``hash`` is a :class:`~hvd_sketch.hashing.BlockHash`. None of them communicates.

Functions that select take ``size``, how many they will find, where the caller knows it from a histogram: a device
that works by itself then need not be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash

ON_HOST = True  # whether the tensors lie in host memory
MAGNITUDE_MASK = 0x7FFFFFFF  # a float32 without its sign: unsigned order is the order of magnitudes


def feedback_(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> None:
    """``u <- m * u + g``, ``v <- v + u`` (paper, Alg. 3, lines 1 and 2) in place, each operation rounded on its own.

    All float32 [n]; ``u`` is None where momentum is 0: then it is g itself.
    """
    if u is not None:
        gradient = u.mul_(momentum).add_(gradient)
    v += gradient


def feedback_accumulate_(
    hash: BlockHash, table: Tensor, u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float, start: int
) -> None:
    """:func:`feedback_`, then :func:`accumulate_` of v, in one pass; the tensors hold coordinates ``start …``."""
    feedback_(u, v, gradient, momentum)
    accumulate_(hash, table, v, start)


def accumulate_(hash: BlockHash, table: Tensor, values: Tensor, start: int, rows: range | None = None) -> None:
    """Add coordinates ``start … start + len(values)`` to ``table`` [rows, shards, C] in place.

    Only the given ``rows`` of it (consecutive ones); default all.

    Source: Count Sketch update (paper, Alg. 4): ``S[j, h_j(i)] += s_j(i) * x``.
    """
    index = np.arange(start, start + values.numel(), dtype=np.int64)
    for row in range(hash.rows) if rows is None else rows:
        np.add.at(table[row].numpy(), hash.cells(row, index), hash.signs(row, index) * values.numpy())


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """Median over rows for coordinates ``start … stop`` from a whole ``table`` [rows, shards, C].

    For an even row count the mean of the two middle values (the lower one alone is biased).
    Returns float32 [stop - start].
    """
    index = np.arange(start, stop, dtype=np.int64)
    votes = np.empty((hash.rows, index.size), dtype=np.float32)
    for row in range(hash.rows):
        votes[row] = hash.signs(row, index) * table[row].numpy()[hash.cells(row, index)]
    return torch.from_numpy(_median(votes))


def estimate_owned(hash: BlockHash, shard_table: Tensor, shard: int) -> Tensor:
    """Median over rows for all coordinates of one shard, from its part ``shard_table`` [rows, C].

    Returns float32 [hash.owned_size(shard)] in the owner's own order.
    """
    index = hash.owned_to_global(shard, np.arange(hash.owned_size(shard), dtype=np.int64))
    votes = np.empty((hash.rows, index.size), dtype=np.float32)
    for row in range(hash.rows):
        votes[row] = hash.signs(row, index) * shard_table[row].numpy()[hash.cells(row, index)[1]]
    return torch.from_numpy(_median(votes))


def owned_histogram(hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int) -> Tensor:
    """:func:`magnitude_histogram` of :func:`estimate_owned`, which other backends do not write to memory."""
    return magnitude_histogram(estimate_owned(hash, shard_table, shard), start, shift, bins)


def owned_histogram_kept(
    hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int, limit: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """:func:`owned_histogram`, and what it counts, as :func:`owned_above` returns it, padded with zeros at will.

    What is kept is not all, or None, where more than ``limit`` are counted.
    """
    estimates = estimate_owned(hash, shard_table, shard)
    positions = select_above(estimates, start - 1)[:limit]
    return magnitude_histogram(estimates, start, shift, bins), (positions, estimates[positions])


def owned_above(
    hash: BlockHash, shard_table: Tensor, shard: int, threshold: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`select_above` of :func:`estimate_owned`, which other backends do not write to memory.

    Returns positions, int64 (or int32 where the shard's size fits) ascending, and the estimates there, float32.
    """
    estimates = estimate_owned(hash, shard_table, shard)
    positions = select_above(estimates, threshold, size)
    return positions, estimates[positions]


def magnitude_histogram(values: Tensor, start: int, shift: int, bins: int) -> Tensor:
    """Counts float32 magnitude bits ``m`` (31 of them) in bins ``2**shift`` wide, from ``start`` upwards.

    Of the non-zero values with ``m >= start``, count how many have each value of ``(m - start) >> shift``; all from
    ``bins`` on count as ``bins``. Infinities and NaN count as the largest magnitudes. Returns int64 [bins + 1].
    """
    magnitude = _magnitude(values)
    counted = magnitude[(magnitude != 0) & (magnitude >= start)]
    counts = np.bincount(np.minimum((counted - start) >> shift, bins), minlength=bins + 1)
    return torch.from_numpy(counts.astype(np.int64))


def select_above(values: Tensor, threshold: int, size: int | None = None) -> Tensor:
    """Positions with magnitude bits above ``threshold``: int64, ascending.

    Zeros are never selected: a threshold below 0 counts as 0.
    """
    chosen = np.flatnonzero(_magnitude(values) > max(threshold, 0)).astype(np.int64)
    # A device that relied on a wrong size would return too much or too little.
    assert size in (None, len(chosen)), f"{len(chosen)} are chosen, {size} were expected"
    return torch.from_numpy(chosen)


def keep_above(positions: Tensor, values: Tensor, threshold: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Of ``positions`` and ``values`` [n], those that :func:`select_above` chooses by the values."""
    chosen = select_above(values, threshold, size)
    return positions[chosen], values[chosen]


def gather(values: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """``out[i] = values[indices[i]]`` for int64 indices, all within ``values``; returns ``out``."""
    return torch.index_select(values, 0, indices, out=out)


def clear_(vector: Tensor, indices: Tensor) -> None:
    """Zero ``vector`` at distinct int64 indices, all within it."""
    vector.index_fill_(0, indices, 0)


def scatter_(targets: Sequence[Tensor | None], starts: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write float32 ``values`` [n] at distinct ``indices`` of several tensors seen as one vector.

    Args:
        targets: contiguous, of one dtype, which the values are rounded to; None in place of those to be let alone.
        starts: int64 [len(targets) + 1], where in the vector each begins, and where it ends.
        indices: int64 [n], ascending.
    """
    cuts = torch.searchsorted(indices, starts).tolist()
    for target, start, first, last in zip(targets, starts.tolist(), cuts, cuts[1:], strict=False):
        if target is not None and first < last:
            target.view(-1)[indices[first:last] - start] = values[first:last].to(target.dtype)


def _median(votes: np.ndarray) -> np.ndarray:
    votes.sort(axis=0)
    rows = len(votes)
    if rows % 2:
        return votes[rows // 2].copy()
    return (votes[rows // 2 - 1] + votes[rows // 2]) * np.float32(0.5)


def _magnitude(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.int32) & MAGNITUDE_MASK
