"""What bounds the GPU kernels, measured by itself: the hash without any data, and the level-2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import gpu
from hvd_sketch.kernels._gpu_hash import columns, for_lanes, lanes, sign_words, tile_blocks


def hash_only(hash: BlockHash, device: torch.device) -> Tensor:
    """Evaluate what a sketch needs of the hash and nothing else; returns a checksum of each tile: int64 [tiles].

    Summed are the words of 16 signs, one for each run of at most 16 coordinates, and the offsets of the blocks.
    """
    coefficients = gpu.device_coefficients(hash, device)
    sums = torch.empty(-(-hash.dim // gpu.TILE), dtype=torch.int64, device=device)
    constants = {"BLOCK": hash.block, "LANES": gpu._lanes(hash), "TILE": gpu.TILE}
    gpu._launch(hash_tiles, sums.numel(), sums, coefficients, hash.dim, hash.shard_cols, hash.rows, **constants)
    return sums


@triton.jit(do_not_specialize=["rows"])
def hash_tiles(
    sums, coefficients, dim, cols, rows, BLOCK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    block, _ = tile_blocks(coefficients, tile, 0, cols, False, BLOCK, 1, TILE)
    first, _ = lanes(BLOCK, LANES, TILE)
    origin = for_lanes(block, BLOCK, LANES, TILE) * BLOCK + first
    words = tl.full((TILE // LANES,), 0, tl.int64)
    offsets = tl.full((TILE // BLOCK,), 0, tl.int64)
    for row in range(rows):
        words += sign_words(coefficients, row, origin >> 4)
        offsets += columns(coefficients, row, block, cols)
    total = tl.sum(tl.where(origin < dim, words, 0), 0) + tl.sum(tl.where(block * BLOCK < dim, offsets, 0), 0)
    tl.store(sums + tile, total)


def walk(buffer: Tensor, passes: int, adding: bool) -> Tensor:
    """Read all of ``buffer``, float32, or add 1 to each of its cells, ``passes`` times; returns each program's sum.

    Cells beyond a multiple of TILE are left out.
    """
    tiles = buffer.numel() // gpu.TILE
    sums = torch.empty(tiles, device=buffer.device)
    gpu._launch(walk_tiles, tiles, buffer, sums, tiles, passes, ADDING=adding, TILE=gpu.TILE)
    return sums


@triton.jit(do_not_specialize=["tiles", "passes"])
def walk_tiles(buffer, sums, tiles, passes, ADDING: tl.constexpr, TILE: tl.constexpr):
    """Each program meets another tile in each pass, and reads past the level-1 cache."""
    lane = tl.arange(0, TILE)
    total = tl.full((TILE,), 0, tl.float32)
    for step in range(passes):
        cells = buffer + ((tl.program_id(0) + step * 61) % tiles) * TILE + lane
        if ADDING:
            tl.atomic_add(cells, 1.0, sem="relaxed")
        else:
            total += tl.load(cells, cache_modifier=".cg")
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
