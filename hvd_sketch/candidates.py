"""Candidate finding: which coordinates are worth an exact value. One replaceable step of the exchange."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.coding import decode_positions, encode_positions
from hvd_sketch.config import SketchConfig
from hvd_sketch.kernels import load_backend
from hvd_sketch.selection import select_largest
from hvd_sketch.sketch import CountSketch, fill_at_random, keep_heavy_, row_energies
from hvd_sketch.volume import MeteredTransport


class CandidateSource(Protocol):
    """Names the coordinates whose exact sums are exchanged."""

    def find(self, v: Tensor, step: int) -> Tensor:
        """Candidates for the summed ``v`` (float32 [dim], this rank's): int64, ascending, equal on all ranks.

        Communication: collective, all ranks in the same order.
        """


class SketchCandidates:
    """Candidates from the summed Count Sketch (paper, Alg. 3, line 4; Alg. 1 for HEAVYMIX).

    The table is summed by reduce_scatter: each rank holds the sum of the columns of its own shard only, and
    judges the coordinates that hash into them, alone. So no two ranks can disagree through rounding, and the
    time to recover falls with the number of ranks.
    """

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device | str) -> None:
        self._config = config
        self._comm = comm
        self._kernels = load_backend(None, torch.device(device))
        self._sketch = CountSketch(dim, config.rows, config.cols, config.seed, shards=comm.size, device=device)

    def find(self, v: Tensor, step: int) -> Tensor:
        summed = self._sum_sketches(v, step)
        estimates = self._kernels.estimate_owned(self._sketch.hash, summed, self._comm.rank)
        if self._config.selection == "heavymix":
            return self._heavymix(summed, estimates, step)
        return self._top(estimates, self._config.candidates(v.numel()))

    def _sum_sketches(self, v: Tensor, step: int) -> Tensor:
        """This rank's shard of the sum of all sketches: float32 [rows, cols // size]."""
        table = self._sketch.zero_(step).accumulate_(v).table
        with self._comm.phase("sketch"):
            rows = [self._comm.start_reduce_scatter(row) for row in table]
            return torch.stack([row.wait() for row in rows])

    def _top(self, estimates: Tensor, count: int) -> Tensor:
        """The ``count`` largest estimates over all owners, made known to every rank."""
        with self._comm.phase("select"):
            chosen = select_largest(self._kernels, estimates, count, self._comm)
        with self._comm.phase("indices"):
            encoded = self._comm.allgather(encode_positions(chosen))
        shards = enumerate(decode_positions(encoded))
        owned = [self._sketch.hash.owned_to_global(shard, positions.numpy()) for shard, positions in shards]
        # Stable sorting in NumPy merges runs that are sorted already, and the owners' lists are.
        return torch.from_numpy(np.sort(np.concatenate(owned), kind="stable"))

    def _heavymix(self, summed: Tensor, estimates: Tensor, step: int) -> Tensor:
        """H, the heavy coordinates, and others at random: k in all, the same on every rank."""
        k, dim = self._config.k, self._sketch.hash.dim
        with self._comm.phase("norm"):
            energies = self._comm.allgather(row_energies(summed).unsqueeze(0))  # [size, rows]
        # fsum is exact, so that every rank has the same bits.
        norm = math.sqrt(np.median([math.fsum(row) for row in energies.T.tolist()]))
        heavy = self._top(keep_heavy_(estimates, norm, k), k)
        return fill_at_random(heavy, k, dim, self._config.seed, step)
