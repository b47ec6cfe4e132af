"""Numba code of few-bit codes; :mod:`hvd_sketch.kernels.cpu` calls it, :func:`reference.quantize` is its specification.

Threads divide chunks among them. All that these kernels call is in this one file, because Numba's on-disk cache only
notices changes of the file of the cached function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hvd_sketch.kernels.reference import LEAST_SCALE, MAGNITUDE_MASK

Array = np.ndarray
# Bits of a code, values of a chunk, the largest code, bits of the largest scale.
Code = tuple[int, int, int, int]

_MAGNITUDE = np.uint32(MAGNITUDE_MASK)
_LEAST_SCALE = np.uint32(LEAST_SCALE)


@njit(nogil=True, cache=True, error_model="numpy")
def quantize(
    packed: Array, values: Array, code: Code, dither: np.uint32, stochastic: bool, thread: int, threads: int
) -> None:
    """See :func:`hvd_sketch.kernels.reference.quantize`; ``dither`` counts only where ``stochastic``."""
    bits, chunk, most, _ = code
    segments, length = values.shape
    chunks = (length + chunk - 1) // chunk
    rounded = np.empty(chunk, dtype=np.int32)
    for number in range(thread * segments * chunks // threads, (thread + 1) * segments * chunks // threads):
        segment, first = number // chunks, number % chunks * chunk
        count = min(chunk, length - first)
        own = values[segment, first : first + count]
        scale_bits, inverse = _scale_of(own, code)
        at = 2 * (number % chunks)
        packed[segment, at] = (scale_bits >> np.uint32(16)) & np.uint32(255)
        packed[segment, at + 1] = scale_bits >> np.uint32(24)
        if stochastic:
            _round_stochastically(rounded, own, inverse, most, np.uint32(segment * length + first), dither)
        else:
            _round(rounded, own, inverse, most)
        _pack(packed[segment, 2 * chunks + first * bits // 8 :], rounded, count, bits)


@njit(error_model="numpy")
def _scale_of(values: Array, code: Code) -> Any:
    """Bits of the scale, uint32, and what values are multiplied by."""
    largest = np.uint32(0)
    bits = values.view(np.uint32)
    for i in range(np.uint64(bits.size)):
        largest = np.uint32(max(largest, bits[i] & _MAGNITUDE))
    wanted = np.float32(np.uint32(largest).view(np.float32) / np.float32(code[2])).view(np.uint32)
    scale = np.uint32(min((wanted + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000), np.uint32(code[3])))
    if scale < _LEAST_SCALE:
        return np.uint32(0), np.float32(0)
    return scale, np.float32(np.float32(1) / np.uint32(scale).view(np.float32))


@njit(error_model="numpy")
def _round(rounded: Array, values: Array, inverse: np.float32, most: int) -> None:
    limit = np.float32(most)
    for i in range(np.uint64(values.size)):
        rounded[i] = np.int32(min(max(np.rint(values[i] * inverse), -limit), limit))


@njit(error_model="numpy")
def _round_stochastically(
    rounded: Array, values: Array, inverse: np.float32, most: int, place: np.uint32, dither: np.uint32
) -> None:
    limit = np.float32(most)
    for i in range(np.uint64(values.size)):
        mixed = np.uint32(place + np.uint32(i)) ^ dither
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        mixed ^= mixed >> np.uint32(16)
        added = np.float32(mixed >> np.uint32(8)) * np.float32(2**-24) - np.float32(0.5)
        rounded[i] = np.int32(min(max(np.rint(values[i] * inverse + added), -limit), limit))


@njit(error_model="numpy")
def _pack(out: Array, codes: Array, count: int, bits: int) -> None:
    if bits == 4:
        half = np.uint64((count + 1) // 2)
        pairs = np.uint64(count // 2)
        for i in range(pairs):
            out[i] = np.uint8(codes[i] + 8) | np.uint8(codes[half + i] + 8) << np.uint8(4)
        if half > pairs:
            out[pairs] = np.uint8(codes[pairs] + 8)
    elif bits == 8:
        for i in range(np.uint64(count)):
            out[i] = np.uint8(codes[i])
    else:
        for i in range(np.uint64(count)):
            out[2 * i] = np.uint8(codes[i])
            out[2 * i + 1] = np.uint8(codes[i] >> 8)


@njit(nogil=True, cache=True, error_model="numpy")
def dequantize_sum(total: Array, packed: Array, code: Code, thread: int, threads: int) -> None:
    """See :func:`hvd_sketch.kernels.reference.dequantize_sum`."""
    bits, chunk, _, _ = code
    segments, length = total.shape
    chunks = (length + chunk - 1) // chunk
    for number in range(thread * segments * chunks // threads, (thread + 1) * segments * chunks // threads):
        segment, first = number // chunks, number % chunks * chunk
        out = total[segment, first : first + min(chunk, length - first)]
        out[:] = np.float32(0)
        at = 2 * (number % chunks)
        for term in range(packed.shape[0]):
            own = packed[term, segment]
            scale_bits = np.uint32(own[at]) << np.uint32(16) | np.uint32(own[at + 1]) << np.uint32(24)
            scale = np.uint32(scale_bits).view(np.float32)
            _add(out, own[2 * chunks + first * bits // 8 :], scale, bits)


@njit(error_model="numpy")
def _add(out: Array, packed: Array, scale: np.float32, bits: int) -> None:
    if bits == 4:
        half = np.uint64((out.size + 1) // 2)
        pairs = np.uint64(out.size // 2)
        for i in range(half):
            out[i] += np.float32(np.int32(packed[i] & np.uint8(15)) - 8) * scale
        for i in range(pairs):
            out[half + i] += np.float32(np.int32(packed[i] >> np.uint8(4)) - 8) * scale
    elif bits == 8:
        for i in range(np.uint64(out.size)):
            out[i] += np.float32(np.int8(packed[i])) * scale
    else:
        for i in range(np.uint64(out.size)):
            out[i] += np.float32(np.int16(np.uint16(packed[2 * i]) | np.uint16(packed[2 * i + 1]) << 8)) * scale


@njit(nogil=True, cache=True, error_model="numpy")
def subtract_at(vector: Array, indices: Array, values: Array, thread: int, threads: int) -> None:
    """See :func:`hvd_sketch.kernels.reference.subtract_at_`."""
    size = indices.size
    for i in range(thread * size // threads, (thread + 1) * size // threads):
        vector[np.uint64(indices[i])] -= values[i]
