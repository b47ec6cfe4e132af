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

from hvd_sketch.hashing import BlockHash, ceil_div

ON_HOST = True  # whether the tensors are in host memory
MAGNITUDE_MASK = 0x7FFFFFFF  # a float32 without its sign: unsigned order is the order of magnitudes
CHUNKS = {4: 64, 8: 256, 16: 256}  # by bits: how many values share a scale
LARGEST_CODES = {bits: 2 ** (bits - 1) - 1 for bits in CHUNKS}
LEAST_SCALE = 0x00800000  # bits of the smallest normal float32
# Bits of the largest bfloat16 that times the largest code is finite.
LARGEST_SCALES = {
    bits: int(np.float32(np.finfo(np.float32).max / most).view(np.uint32)) & 0xFFFF0000
    for bits, most in LARGEST_CODES.items()
}


def chunks_of(length: int, bits: int) -> int:
    """How many scales a segment of few-bit codes has."""
    return ceil_div(length, CHUNKS[bits])


def packed_bytes(length: int, bits: int) -> int:
    """How long a segment of few-bit codes is, see :func:`quantize`."""
    return 2 * chunks_of(length, bits) + ceil_div(length * bits, 8)


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


def values_above(values: Tensor, threshold: int, limit: int) -> tuple[Tensor, Tensor] | None:
    """:func:`select_above`, and the values there, float32; None where there are more than ``limit``."""
    chosen = select_above(values, threshold)
    return (chosen, values[chosen]) if chosen.numel() <= limit else None


def sums_above(values: Tensor, addends: Tensor, threshold: int, limit: int) -> tuple[Tensor, Tensor] | None:
    """:func:`values_above` of ``values + addends``, which a CPU does not write to memory."""
    return values_above(values + addends, threshold, limit)


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


def subtract_at_(vector: Tensor, indices: Tensor, values: Tensor) -> None:
    """``vector[indices[i]] -= values[i]`` for distinct int64 indices, all within it."""
    vector[indices] -= values


def quantize(values: Tensor, bits: int, dither: int | None = None) -> Tensor:
    """Few-bit codes of float32 [segments, length]: uint8 [segments, packed_bytes(length, bits)].

    A segment is cut into chunks of ``CHUNKS[bits]`` values; the last one may be shorter. A chunk's scale is its largest
    magnitude divided by the largest code, rounded up to a bfloat16. A value's code is its quotient by the scale,
    rounded to the nearest integer, ties to even. Where the scale would be subnormal, all codes are 0.

    With ``dither``, a number below 2**32, the rounding is stochastic: of 1.25, three in four become 1 and one becomes
    2. Which ones is a function of ``dither`` and of the value's place.

    A segment's bytes: the scales, 2 bytes each, then the codes. Codes of 8 and 16 bits are signed integers. Codes of 4
    bits have 8 added; a chunk of n has ``h = ceil(n / 2)`` bytes of them: byte i holds code i in its lower half and
    code h + i, or 0, in its upper half. All is little-endian.
    """
    segments, length = values.shape
    codes = np.zeros((segments, chunks_of(length, bits), CHUNKS[bits]), dtype=np.float32)
    codes.reshape(segments, -1)[:, :length] = values.numpy()
    scale = _scales(np.abs(codes).max(axis=-1, keepdims=True, initial=0), bits)
    with np.errstate(divide="ignore"):
        codes *= np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    if dither is not None:
        place = np.arange(segments * length, dtype=np.uint32).reshape(segments, length)
        codes.reshape(segments, -1)[:, :length] += dither_at(place, dither)
    most = LARGEST_CODES[bits]
    codes = np.clip(np.rint(codes), -most, most)
    scales = (scale.view(np.uint32) >> 16).astype("<u2").reshape(segments, -1).view(np.uint8)
    if bits == 4:
        packed = _packed_nibbles(codes, length)
    else:
        packed = codes.reshape(segments, -1)[:, :length].astype(f"<i{bits // 8}").view(np.uint8)
    return torch.from_numpy(np.concatenate([scales, packed], axis=1))


def dequantize_sum(packed: Tensor, length: int, bits: int) -> Tensor:
    """The sum of what codes stand for: float32 [segments, length], of uint8 [terms, segments, bytes], term by term.

    Each is ``code * scale``, rounded to float32 before it is added.
    """
    _, segments, _ = packed.shape
    scale_bytes = 2 * chunks_of(length, bits)
    total = torch.zeros(segments, length, dtype=torch.float32, device="cpu")
    for term in packed.numpy():
        scales = np.ascontiguousarray(term[:, :scale_bytes]).view("<u2").astype(np.uint32) << 16
        data = np.ascontiguousarray(term[:, scale_bytes:])
        codes = _unpacked_nibbles(data, length) if bits == 4 else data.view(f"<i{bits // 8}")
        each = np.repeat(scales.view(np.float32), CHUNKS[bits], axis=1)[:, :length]
        total += torch.from_numpy(codes.astype(np.float32) * each)
    return total


def dither_at(place: np.ndarray, dither: int) -> np.ndarray:
    """What stochastic rounding adds to the value at a place, uint32 [n], before it rounds: float32, in [-0.5, 0.5).

    Source: the finalizer of MurmurHash3.
    """
    mixed = place ^ np.uint32(dither)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(16)
    return (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


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


def _scales(largest: np.ndarray, bits: int) -> np.ndarray:
    """A chunk's scale from its largest magnitude, float32 with the bits of a bfloat16; 0 where it is subnormal."""
    wanted = (largest / np.float32(LARGEST_CODES[bits])).astype(np.float32).view(np.uint32)
    scale = np.minimum((wanted + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000), np.uint32(LARGEST_SCALES[bits]))
    return np.where(scale < LEAST_SCALE, np.uint32(0), scale).astype(np.uint32).view(np.float32)


def _packed_nibbles(codes: np.ndarray, length: int) -> np.ndarray:
    """Two codes a byte, of float [segments, chunks, chunk]: uint8 [segments, ceil(length / 2)]."""
    chunk = codes.shape[-1]
    pieces = []
    for number in range(codes.shape[1]):
        count = min(chunk, length - number * chunk)
        half = ceil_div(count, 2)
        high = np.zeros((len(codes), half), dtype=np.uint8)
        high[:, : count - half] = codes[:, number, half:count].astype(np.int8) + 8
        pieces.append((codes[:, number, :half].astype(np.int8) + 8).astype(np.uint8) | high << 4)
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((len(codes), 0), dtype=np.uint8)


def _unpacked_nibbles(data: np.ndarray, length: int) -> np.ndarray:
    """What :func:`_packed_nibbles` packed: int8 [segments, length]."""
    chunk = CHUNKS[4]
    pieces = []
    for first in range(0, length, chunk):
        count = min(chunk, length - first)
        half = ceil_div(count, 2)
        both = data[:, first // 2 : first // 2 + half]
        pieces.append(np.concatenate([both & 15, both >> 4], axis=1)[:, :count].astype(np.int8) - 8)
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((len(data), 0), dtype=np.int8)


def _median(votes: list[np.ndarray]) -> Tensor:
    ordered, rows = np.sort(np.stack(votes), axis=0), len(votes)
    if rows % 2:
        return torch.from_numpy(ordered[rows // 2].copy())
    return torch.from_numpy((ordered[rows // 2 - 1] + ordered[rows // 2]) * np.float32(0.5))


def _magnitude(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.int32) & MAGNITUDE_MASK
