"""HEAVYMIX: heavy coordinates from the summed Count Sketch, and others at random."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from hvd_sketch.exchange.candidates.sketch import SketchCandidates
from hvd_sketch.exchange.threshold import LocalValues
from hvd_sketch.sketch import fill_at_random, heavy_threshold, row_energies


class HeavymixCandidates(SketchCandidates):
    """k coordinates, the same on every rank (paper, Alg. 1): H, the heavy ones, filled up at random.

    Heavy are those with ``estimate ** 2 >= norm ** 2 / k``, at most k of them.
    """

    def _choose(self, summed: Tensor) -> Tensor:
        k, hash = self._config.k, self._sketch.hash
        with self._comm.phase("norm"):
            energies = self._comm.allgather(row_energies(summed).unsqueeze(0))  # [size, rows]
        # fsum is exact, so that every rank has the same bits.
        norm = math.sqrt(np.median([math.fsum(row) for row in energies.T.tolist()]))
        positions, estimates = self._kernels.owned_above(hash, summed, self._comm.rank, heavy_threshold(norm, k))
        threshold = self._find_threshold(LocalValues(self._kernels, estimates), k)
        edge = threshold.upper if threshold.excess else threshold.edge  # above it are at most k
        heavy = self._allgather_candidates(positions[self._kernels.select_above(estimates, edge - 1)])
        return fill_at_random(heavy, k, hash.dim, self._config.seed, self._step)
