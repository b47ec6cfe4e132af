"""Triton code of the GPU kernels: the hash, and the tiles that programs work on.

A tile is TILE coordinates from a multiple of TILE on: a whole number of blocks, as a matrix [TILE // LANES, LANES]. The
elements of a row of the matrix share a sign word. Block numbers, coordinates and shards' first cells are int64, columns
int32, field elements uint32. :func:`hvd_sketch.kernels.gpu.device_coefficients` lays out ``coefficients``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# A parameter's type is known when a kernel is compiled; an annotation would say constexpr or nothing.

import triton
import triton.language as tl

from hvd_sketch.hashing import PRIME

_PRIME = tl.constexpr(PRIME)

# Kernels are compiled once for all values of these. For other numbers Triton compiles variants, such as for multiples
# of 16: lengths that are multiples make loads 16 bytes wide, and lengths do not change from step to step.
VARYING = [
    "row",
    "first_row",
    "last_row",
    "first_block",
    "count",
    "shard",
    "momentum",
    "edge",
    "threshold",
    "room",
    "targets",
]

# --- the hash (hvd_sketch.hashing is its specification) ----------------------------------------------------


@triton.jit
def _reduced(value):
    """``value`` modulo 2^31 - 1, without a division: 2^31 = 1 there. uint32 [0, PRIME)."""
    folded = (value & _PRIME).to(tl.uint32) + (value >> 31).to(tl.uint32)
    return tl.minimum(folded, folded - _PRIME)  # which wraps where it would be negative


@triton.jit
def _step(value, x, coefficient):
    """``value * x + coefficient`` in the field: one instruction for 32-bit factors, four for 64-bit ones."""
    return _reduced(value.to(tl.uint64) * x.to(tl.uint64) + tl.load(coefficient).to(tl.uint32).to(tl.uint64))


@triton.jit
def _cubic(coefficients, x):
    """The cubic at ``x`` (below PRIME) over GF(2^31 - 1): uint32 in [0, PRIME)."""
    x = x.to(tl.uint32)
    value = tl.load(coefficients + 3).to(tl.uint32)
    value = _step(value, x, coefficients + 2)
    value = _step(value, x, coefficients + 1)
    return _step(value, x, coefficients)


@triton.jit
def _scaled(coefficients, x, size):
    """The cubic at ``x`` mapped to [0, size): int64."""
    return ((_cubic(coefficients, x).to(tl.uint64) * size) >> 31).to(tl.int64)


@triton.jit
def rotations(coefficients, group, SHARDS: tl.constexpr):
    if SHARDS == 1:
        return group * 0
    else:
        return _scaled(coefficients, group, SHARDS)


@triton.jit
def shards(coefficients, block, SHARDS: tl.constexpr):
    return (block % SHARDS + rotations(coefficients, block // SHARDS, SHARDS)) % SHARDS


@triton.jit
def columns(coefficients, row, block, cols):
    """Column of lane 0 of each block: int32."""
    return _scaled(coefficients + 8 + 8 * row, block, cols).to(tl.int32)


@triton.jit
def sign_words(coefficients, row, word):
    """Words of 16 sign bits, int32."""
    return (_cubic(coefficients + 4 + 8 * row, word) & 0xFFFF).to(tl.int32)


@triton.jit
def flip(values, words, origin, place):
    """Bits, int32, of a matrix of float32 values, negated where the coordinate's bit in the row's word is set."""
    bit = (origin & 15).to(tl.int32)[:, None] + place
    return values.to(tl.int32, bitcast=True) ^ ((words[:, None] >> bit) << 31)


# --- tiles -------------------------------------------------------------------------------------------------


@triton.jit
def for_lanes(per_block, BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """From [TILE // BLOCK] to [TILE // LANES], each repeated: an offset is hashed once per block, not once per row."""
    repeated = tl.broadcast_to(per_block[:, None], (TILE // BLOCK, BLOCK // LANES))
    return tl.reshape(repeated, (TILE // LANES,))


@triton.jit
def lanes(BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """Lane within its block of each row's first element, [TILE // LANES], and places within a row, [1, LANES]."""
    return (tl.arange(0, TILE // LANES) * LANES) % BLOCK, tl.arange(0, LANES)[None, :]


@triton.jit
def wrap(column, cols):
    return tl.where(column >= cols, column - cols, column)


@triton.jit
def tile_blocks(
    coefficients, tile, shard, cols, OWNED: tl.constexpr, BLOCK: tl.constexpr, SHARDS: tl.constexpr, TILE: tl.constexpr
):
    """Blocks of a tile, and the first cell of their shard in a row of the table: int64 [TILE // BLOCK].

    With OWNED the tile is of a shard's coordinates in its owner's order, and the table holds no other shard.
    """
    block = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    if OWNED:
        place = shard - rotations(coefficients, block, SHARDS)
        return block * SHARDS + tl.where(place < 0, place + SHARDS, place), block * 0
    else:
        return block, shards(coefficients, block, SHARDS) * cols
