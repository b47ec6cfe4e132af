"""Triton code of few-bit codes; :func:`hvd_sketch.kernels.reference.quantize` is the specification.

A program has chunks of one segment, as rows of a tile. A row has as many columns as a whole chunk has bytes, or with
16 bits pairs of bytes. Bytes are read and written one by one: a segment may start at an odd address.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from hvd_sketch.kernels.reference import LEAST_SCALE, MAGNITUDE_MASK

_MAGNITUDE = tl.constexpr(MAGNITUDE_MASK)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_TO_WHOLE = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds to the nearest integer, ties to even
_VARYING = ["dither", "terms"]


@triton.jit
def _tile(length, BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """This program's segment, its chunks [CHUNKS, 1], the chunks of a segment, and of each chunk the first value, the
    number of values and of bytes (of 16 bits: pairs of bytes). A chunk past the segment's end has no values.
    """
    chunks = (length + CHUNK - 1) // CHUNK
    programs = (chunks + CHUNKS - 1) // CHUNKS
    segment = (tl.program_id(0) // programs).to(tl.int64)
    chunk = tl.program_id(0) % programs * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    first = chunk.to(tl.int64) * CHUNK
    count = tl.minimum(tl.maximum(length - first, 0), CHUNK)
    width = (count + 1) // 2 if BITS == 4 else count
    return segment, chunk, chunks, first, count, width


@triton.jit
def _dithers(place, dither):
    """See :func:`hvd_sketch.kernels.reference.dither_at`."""
    mixed = place.to(tl.uint32) ^ dither.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    mixed ^= mixed >> 16
    return (mixed >> 8).to(tl.float32) * (2.0**-24) - 0.5


@triton.jit
def _codes(values, inverse, place, dither, MOST: tl.constexpr):
    """Whole numbers, int32. Compile it without fused rounding."""
    scaled = values * inverse
    if dither is not None:
        scaled += _dithers(place, dither)
    scaled = tl.minimum(tl.maximum(scaled, -MOST), MOST)
    return ((scaled + _TO_WHOLE) - _TO_WHOLE).to(tl.int32)


@triton.jit
def _largest(values):
    """Of each row, magnitude bits [CHUNKS, 1]."""
    return tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, 1)[:, None]


@triton.jit
def _scales(largest, MOST: tl.constexpr, LARGEST_SCALE: tl.constexpr):
    """Bits of the scales, and what values are multiplied by, from the largest magnitude's bits."""
    largest = largest.to(tl.float32, bitcast=True)
    wanted = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32)).to(tl.uint32, bitcast=True)
    scale = tl.minimum((wanted + 0xFFFF) & 0xFFFF0000, LARGEST_SCALE).to(tl.int32)
    scale = tl.where(scale < _LEAST_SCALE, 0, scale)
    one = tl.full(scale.shape, 1.0, tl.float32)
    divisor = tl.where(scale == 0, one, scale.to(tl.float32, bitcast=True))
    return scale, tl.where(scale == 0, 0.0, tl.div_rn(one, divisor))


@triton.jit(do_not_specialize=_VARYING)
def quantize(
    packed, values, dither, length, segment_bytes,
    BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, MOST: tl.constexpr, LARGEST_SCALE: tl.constexpr,
):  # fmt: skip
    segment, chunk, chunks, first, count, width = _tile(length, BITS, CHUNK, CHUNKS)
    column = tl.arange(0, CHUNK // 2 if BITS == 4 else CHUNK)[None, :]
    at = segment * length + first + column
    own = tl.load(values + at, mask=column < width, other=0.0)
    largest = _largest(own)
    if BITS == 4:
        upper = tl.load(values + at + width, mask=column + width < count, other=0.0)
        largest = tl.maximum(largest, _largest(upper))
    scale, inverse = _scales(largest, MOST, LARGEST_SCALE)
    packed += segment * segment_bytes
    tl.store(packed + 2 * chunk, (scale >> 16).to(tl.uint8), mask=count > 0)
    tl.store(packed + 2 * chunk + 1, (scale >> 24).to(tl.uint8), mask=count > 0)
    codes = _codes(own, inverse, at, dither, MOST)
    out = packed + 2 * chunks + first * BITS // 8 + (column * 2 if BITS == 16 else column)
    if BITS == 4:
        upper_codes = _codes(upper, inverse, at + width, dither, MOST) + 8
        codes = codes + 8 | tl.where(column + width < count, upper_codes, 0) << 4
    tl.store(out, codes.to(tl.uint8), mask=column < width)
    if BITS == 16:
        tl.store(out + 1, (codes >> 8).to(tl.uint8), mask=column < width)


@triton.jit(do_not_specialize=_VARYING)
def dequantize_sum(
    total, packed, terms, length, term_stride, segment_stride,
    BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Each value is added up by one program, term by term. Compile it without fused rounding."""
    segment, chunk, chunks, first, count, width = _tile(length, BITS, CHUNK, CHUNKS)
    WIDTH: tl.constexpr = CHUNK // 2 if BITS == 4 else CHUNK
    column = tl.arange(0, WIDTH)[None, :]
    packed += segment * segment_stride
    data = 2 * chunks + first * BITS // 8 + (column * 2 if BITS == 16 else column)
    sums = tl.full((CHUNKS, WIDTH), 0.0, tl.float32)
    upper_sums = sums
    for _ in range(terms):
        low = tl.load(packed + 2 * chunk, mask=count > 0, other=0).to(tl.int32) << 16
        high = tl.load(packed + 2 * chunk + 1, mask=count > 0, other=0).to(tl.int32) << 24
        scale = (low | high).to(tl.float32, bitcast=True)
        codes = tl.load(packed + data, mask=column < width, other=0).to(tl.int32)
        if BITS == 4:
            upper_sums += ((codes >> 4) - 8).to(tl.float32) * scale
            codes = (codes & 15) - 8
        elif BITS == 8:
            codes = codes << 24 >> 24
        else:
            signed = tl.load(packed + data + 1, mask=column < width, other=0).to(tl.int32)
            codes |= signed << 24 >> 16
        sums += codes.to(tl.float32) * scale
        packed += term_stride
    at = segment * length + first + column
    tl.store(total + at, sums, mask=column < width)
    if BITS == 4:
        tl.store(total + at + width, upper_sums, mask=column + width < count)


@triton.jit
def subtract_at(vector, indices, values, size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < size
    cell = vector + tl.load(indices + at, mask=mask, other=0)
    tl.store(cell, tl.load(cell, mask=mask) - tl.load(values + at, mask=mask), mask=mask)
