"""CountSketch: a linear, mergeable summary of a vector from which its heavy coordinates are found."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash, Purpose, random_words
from hvd_sketch.kernels import load_backend
from hvd_sketch.kernels.selection import top_k


class CountSketch:
    """Count Sketch of a ``dim``-long float32 vector (paper, Alg. 4; Charikar et al. 2002).

    Args:
        dim: length of the vector, at least 1.
        rows, cols: shape of the table, all shards together; ``cols`` at least ``shards``.
        seed, step: of the hash; only sketches with equal ``seed`` and ``step`` merge.
        shards: the coordinates and the table's columns are divided into shards, one for each rank.
        device: of the table.
        backend: "reference" (NumPy), "numba" (CPU), "triton" (CUDA), or None for the fastest on ``device``.

    Attributes:
        table: float32 [rows, shards, cols // shards].
        hash: the :class:`~hvd_sketch.hashing.BlockHash` of the current step.

    Communication: none, in any method.
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        cols: int,
        seed: int = 0,
        step: int = 0,
        shards: int = 1,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        self.hash = BlockHash(dim, rows, cols, shards, seed, step)
        self._kernels = load_backend(backend, torch.device(device))
        self.table = torch.zeros(self.hash.table_shape, dtype=torch.float32, device=device)

    def accumulate_(self, values: Tensor, start: int = 0) -> CountSketch:
        """Add ``values`` (float32 [n]) to coordinates ``start … start + n``. Returns self."""
        if values.dtype != torch.float32 or values.ndim != 1:
            raise ValueError(f"values must be a float32 vector, got {values.dtype} {tuple(values.shape)}")
        self._check_range(start, start + values.numel())
        self._kernels.accumulate_(self.hash, self.table, values.detach().contiguous(), start)
        return self

    def merge_(self, other: CountSketch) -> CountSketch:
        """Add another sketch: the sketch of the sum of both vectors. Returns self.

        Raises:
            ValueError: dim, rows, cols, seed, step or shards differ.
        """
        for name in ("dim", "rows", "cols", "seed", "step", "shards"):
            mine, theirs = getattr(self.hash, name), getattr(other.hash, name)
            if mine != theirs:
                raise ValueError(f"sketches of different hashes do not merge: {name} is {mine} here, {theirs} there")
        self.table += other.table
        return self

    def zero_(self, step: int | None = None) -> CountSketch:
        """Empty the table; with ``step``, use that step's hash from now on. Returns self."""
        self.table.zero_()
        if step is not None and step != self.hash.step:
            h = self.hash
            self.hash = BlockHash(h.dim, h.rows, h.cols, h.shards, h.seed, step)
        return self

    def estimate(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Estimates of coordinates ``start … stop`` (default: all): float32 [stop - start].

        The median over rows; for an even number of rows the mean of the middle two, so that it is unbiased.
        """
        stop = self.hash.dim if stop is None else stop
        self._check_range(start, stop)
        return self._kernels.estimate(self.hash, self.table, start, stop)

    def norm(self) -> float:
        """Estimate of the l2 norm: root of the median over rows of the sum of squares (Alon, Matias, Szegedy 1999)."""
        return math.sqrt(float(np.median(row_energies(self.table).numpy())))

    def top(self, count: int) -> Tensor:
        """The ``count`` coordinates with the largest estimates by magnitude: int64, ascending.

        Fewer where fewer estimates are not zero. Ties go to the lower coordinate.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        return top_k(self.estimate(), count)

    def heavymix(self, k: int, seed: int) -> Tensor:
        """HEAVYMIX (paper, Alg. 1): the heavy coordinates, filled up at random to k: int64 [k], ascending.

        Heavy are those with ``estimate ** 2 >= norm ** 2 / k``, at most the k largest of them. ``1 <= k <= dim``;
        ``seed`` is of the random draw.
        """
        if not 1 <= k <= self.hash.dim:
            raise ValueError(f"k must be between 1 and dim {self.hash.dim}, got {k}")
        estimates = self.estimate()
        heavy = self._kernels.select_above(estimates, heavy_threshold(self.norm(), k))
        heavy = heavy[top_k(estimates[heavy], k)]
        return fill_at_random(heavy, k, self.hash.dim, seed, self.hash.step)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.hash.dim:
            raise ValueError(f"coordinates {start} to {stop} are not within 0 to {self.hash.dim}")


def row_energies(table: Tensor) -> Tensor:
    """Each row's sum of squares, an estimate of the vector's squared norm: float64 [rows], on the CPU."""
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) ** 2 for row in table]).cpu()


def heavy_threshold(norm: float, k: int) -> int:
    """Magnitude bits above which a float32 is at least ``norm / sqrt(k)`` (paper, Alg. 1, line 3).

    If that quotient exceeds float32, only infinities and NaN are above.
    """
    bound, greatest = norm / math.sqrt(k), np.finfo(np.float32).max
    if not bound <= greatest:
        return int(greatest.view(np.int32))
    least = np.float32(bound)
    if float(least) < bound:
        least = np.nextafter(least, np.float32(np.inf))
    return int(least.view(np.int32)) - 1


def fill_at_random(heavy: Tensor, k: int, dim: int, seed: int, step: int) -> Tensor:
    """``heavy`` and ``k - len(heavy)`` others, uniform without replacement: int64 [k], ascending, on its device.

    Equal on every rank. Floyd's algorithm (Bentley and Floyd 1987) draws, from Philox under ``(seed, step)``, places
    among the other coordinates.
    """
    missing = k - heavy.numel()
    others = dim - heavy.numel()
    words = random_words(seed, step, Purpose.HEAVYMIX).random_raw(missing)
    drawn: set[int] = set()
    for last, word in zip(range(others - missing, others), words.tolist(), strict=True):
        candidate = (word * (last + 1)) >> 64  # uniform in [0, last] up to a bias of 2^-29
        drawn.add(last if candidate in drawn else candidate)
    places = np.array(sorted(drawn), dtype=np.int64)
    # Other coordinate number r is r plus the number of heavy ones below it; heavy[i] - i others are below heavy[i].
    taken = heavy.cpu().numpy()
    below = np.searchsorted(taken - np.arange(taken.size), places, side="right")
    return torch.from_numpy(np.sort(np.concatenate([taken, places + below]))).to(heavy.device)
