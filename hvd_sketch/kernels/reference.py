"""The sketch kernels in plain NumPy: slow, readable, and the truth every other backend is tested against.

A backend is a module with these functions. Tensors are float32 and contiguous, on the backend's
device; ``hash`` is a :class:`~hvd_sketch.hashing.BlockHash`. No function communicates.

Functions that select take the number of results as ``size`` where the caller knows it from a histogram: then they need
not wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash

ON_HOST = True  # whether the tensors are in host memory
MAGNITUDE_MASK = 0x7FFFFFFF  # a float32 without its sign: unsigned order is the order of magnitudes


def feedback_(u: Tensor | None, v: Tensor, gradient: Tensor, momentum: float) -> None:
    """``u <- m * u + g``, ``v <- v + u`` (paper, Alg. 3, lines 1 and 2) in place, each operation rounded on its own.

    All float32 [n]. Where momentum is 0, ``u`` is None: ``v <- v + g``.
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
    """Add coordinates ``start … start + len(values)`` to ``table`` [rows, shards, C], in all or the given rows.

    Source: Count Sketch update (paper, Alg. 4): ``S[j, h_j(i)] += s_j(i) * x``.
    """
    index = np.arange(start, start + values.numel(), dtype=np.int64)
    for row in range(hash.rows) if rows is None else rows:
        np.add.at(table[row].numpy(), hash.cells(row, index), hash.signs(row, index) * values.numpy())


def estimate(hash: BlockHash, table: Tensor, start: int, stop: int) -> Tensor:
    """Median over rows for coordinates ``start … stop`` from ``table`` [rows, shards, C]: float32 [stop - start].

    For an even row count the mean of the two middle values (the lower one alone is biased).
    """
    index = np.arange(start, stop, dtype=np.int64)
    return _median([hash.signs(j, index) * row.numpy()[hash.cells(j, index)] for j, row in enumerate(table)])


def estimate_owned(hash: BlockHash, shard_table: Tensor, shard: int) -> Tensor:
    """Median over rows for a shard's coordinates, in its owner's order, from its table [rows, C].

    Returns float32 [hash.owned_size(shard)].
    """
    index = hash.owned_to_global(shard, np.arange(hash.owned_size(shard), dtype=np.int64))
    return _median([hash.signs(j, index) * row.numpy()[hash.cells(j, index)[1]] for j, row in enumerate(shard_table)])


def owned_histogram(hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int) -> Tensor:
    """:func:`magnitude_histogram` of :func:`estimate_owned`, which other backends do not write to memory."""
    return magnitude_histogram(estimate_owned(hash, shard_table, shard), start, shift, bins)


def owned_histogram_kept(
    hash: BlockHash, shard_table: Tensor, shard: int, start: int, shift: int, bins: int, limit: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """:func:`owned_histogram`, and the positions and values that it counts, as :func:`owned_above` returns them.

    Zeros may follow them. Where more than ``limit`` are counted, some are missing, or None is returned instead.
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
    """Count the 31 magnitude bits ``m`` of float32 values in bins ``2**shift`` wide, from ``start`` upwards.

    Bin ``min((m - start) >> shift, bins)`` counts a value that is not zero, with ``m >= start``. Infinities and NaN
    count as the largest magnitudes. Returns int64 [bins + 1].
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
    # A GPU would return too many or too few.
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
        targets: contiguous, of one dtype, to which the values are rounded; None for a tensor that is not written.
        starts: int64 [len(targets) + 1], where each target begins in the vector, and where the vector ends.
        indices: int64 [n], ascending.
    """
    cuts = torch.searchsorted(indices, starts).tolist()
    for target, start, first, last in zip(targets, starts.tolist(), cuts, cuts[1:], strict=False):
        if target is not None and first < last:
            target.view(-1)[indices[first:last] - start] = values[first:last].to(target.dtype)


def _median(votes: list[np.ndarray]) -> Tensor:
    ordered, rows = np.sort(np.stack(votes), axis=0), len(votes)
    if rows % 2:
        return torch.from_numpy(ordered[rows // 2].copy())
    return torch.from_numpy((ordered[rows // 2 - 1] + ordered[rows // 2]) * np.float32(0.5))


def _magnitude(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.int32) & MAGNITUDE_MASK
