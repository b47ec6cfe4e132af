"""DeMo: every rank sends the largest coefficients of a block cosine transform of its momentum to all others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import pi, prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.top_k import CodedTopK
from hvd_sketch.exchange.base import Ranges, SparseUpdate
from hvd_sketch.exchange.matrices import sides_of

LARGEST_SIDE = 64  # of a tile


class DeMo(CodedTopK):
    """v is kept in the transformed domain, tile by tile, and of every tile as many coefficients are sent.

    With ``residual_decay`` of the configuration v is DeMo's momentum, and a ``SignSGD`` follows. All matrices must have
    a gradient in every step. On the CPU.

    Source: Peng et al., DeMo: Decoupled Momentum Optimization, 2024, arXiv:2411.19870.
    """

    def __init__(self, *place: Any, **options: Any) -> None:
        super().__init__(*place, **options)
        self._shapes = [tuple(shape) for shape in options["shapes"]]
        self._share = self.config.k / self.dim

    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        parts = torch.cat(list(gradient)).split([prod(shape) for shape in self._shapes])
        tiles = [to_tiles(part.view(sides_of(shape))) for part, shape in zip(parts, self._shapes, strict=True)]
        super().accumulate([torch.cat([tile.flatten() for tile in tiles])], unused)

    def _choose(self) -> Tensor:
        chosen, start = [], 0
        for shape in self._shapes:
            tile = prod(map(side_of_tile, sides_of(shape)))
            tiles = self.residual[start : start + prod(shape)].view(-1, tile)
            largest = tiles.abs().topk(max(round(self._share * tile), 1)).indices
            firsts = torch.arange(start, start + prod(shape), tile).unsqueeze(1)
            chosen.append((largest + firsts).flatten())
            start += prod(shape)
        return torch.cat(chosen).sort().values

    def _update(self, indices: Tensor, mean: Tensor) -> SparseUpdate:
        parts = mean.split([prod(shape) for shape in self._shapes])
        back = [from_tiles(part, sides_of(shape)).flatten() for part, shape in zip(parts, self._shapes, strict=True)]
        return super()._update(indices, torch.cat(back))


def to_tiles(matrix: Tensor) -> Tensor:
    """The cosine transform of each tile: of float32 [rows, cols] float32 [tiles, elements of a tile]."""
    high, wide = map(side_of_tile, matrix.shape)
    tiles = matrix.reshape(-1, high, matrix.shape[1] // wide, wide).transpose(1, 2)
    return (cosines(high) @ tiles @ cosines(wide).t()).reshape(-1, high * wide)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of which :func:`to_tiles` made the tiles: float32 ``shape``."""
    high, wide = map(side_of_tile, shape)
    back = cosines(high).t() @ tiles.view(shape[0] // high, -1, high, wide) @ cosines(wide)
    return back.transpose(1, 2).reshape(shape)


def side_of_tile(side: int) -> int:
    """The largest divisor of a matrix's side that is at most :data:`LARGEST_SIDE`."""
    return next(size for size in range(min(side, LARGEST_SIDE), 0, -1) if side % size == 0)


@lru_cache
def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, float32 [size, size]."""
    at = torch.arange(size, dtype=torch.float64)
    table = torch.cos(pi / size * (at + 0.5) * at.unsqueeze(1)) * (2 / size) ** 0.5
    table[0] /= 2**0.5
    return table.float()
