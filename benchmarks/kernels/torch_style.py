"""Count Sketch and a whole step of Sketched-SGD as they are usually written in torch: what ours are held against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash

CHUNK = 1 << 20  # coordinates whose buckets are computed at once


class TorchStyle:
    """Stores a bucket (int64) and a sign (float32) per coordinate and row, on any device.

    They are those of ``BlockHash``, so that results must agree with the kernels'.
    """

    def __init__(self, hash: BlockHash, device: torch.device) -> None:
        self.hash = hash
        self.cells = hash.shards * hash.shard_cols
        self.buckets = torch.empty(hash.rows, hash.dim, dtype=torch.int64, device=device)
        self.signs = torch.empty(hash.rows, hash.dim, dtype=torch.float32, device=device)
        for start in range(0, hash.dim, CHUNK):
            index = np.arange(start, min(start + CHUNK, hash.dim))
            for row in range(hash.rows):
                shard, column = hash.cells(row, index)
                self.buckets[row, start : start + CHUNK] = torch.from_numpy(shard * hash.shard_cols + column)
                self.signs[row, start : start + CHUNK] = torch.from_numpy(hash.signs(row, index))

    def sketch(self, values: Tensor) -> Tensor:
        """[rows, cells]."""
        pairs = zip(self.buckets, self.signs, strict=True)
        return torch.stack([torch.bincount(b, weights=s * values, minlength=self.cells) for b, s in pairs])

    def votes(self, table: Tensor) -> Tensor:
        """[rows, dim]."""
        return torch.stack([row[b] * s for row, b, s in zip(table, self.buckets, self.signs, strict=True)])

    def recover(self, table: Tensor, count: int) -> Tensor:
        """The ``count`` largest estimates' coordinates, in any order."""
        return self.votes(table).median(dim=0).values.abs().topk(count).indices

    def step(self, u: Tensor, v: Tensor, gradient: Tensor, momentum: float, candidates: int, k: int) -> Tensor:
        """One step of Alg. 3 on one rank, from the check for NaN and Inf to the zeroing: the indices it sends."""
        assert bool(torch.isfinite(gradient).all())
        u.mul_(momentum).add_(gradient)
        v.add_(u)
        found = self.recover(self.sketch(v), candidates)
        chosen = found[v[found].abs().topk(k).indices]
        u[chosen] = 0
        v[chosen] = 0
        return chosen
