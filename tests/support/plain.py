"""Algorithm 3 of the paper in plain Python, momentum 0: what the exchange must agree with exactly."""

from __future__ import annotations

from statistics import median

import numpy as np

from hvd_sketch.config import SketchConfig
from hvd_sketch.hashing import BlockHash


def from_the_edge(values: list[float], count: int) -> list[int]:
    """At least the ``count`` largest magnitudes, none of them zero: all in and above the bin in which the last of them
    is, on a grid of bins that is finer where the bin is crowded."""
    bits = (np.array(values, dtype=np.float32).view(np.int32) & 0x7FFFFFFF).tolist()
    chosen = [i for i, b in enumerate(bits) if b]
    if len(chosen) <= count:
        return chosen
    last = sorted(bits, reverse=True)[count - 1]
    bins = 2 ** min(max((count.bit_length() + 3) // 2, 4), 11)
    width = 2**23 // bins
    while True:
        edge = last // width * width
        chosen = [i for i, b in enumerate(bits) if b and b >= edge]
        inside = [i for i in chosen if bits[i] < edge + width]
        if width == 1 or len(chosen) == count or len(inside) <= 64 + 4 * bins:
            return chosen
        width = max(width // bins, 1)


class PlainSketchedSGD:
    """All ranks at once, on lists of numbers. Of equal sums the lower index is kept."""

    def __init__(self, config: SketchConfig, dim: int, ranks: int) -> None:
        self.config, self.dim, self.ranks, self.steps = config, dim, ranks, 0
        self.v = [[0.0] * dim for _ in range(ranks)]

    def step(self, gradients: list[list[float]]) -> dict[int, float]:
        c = self.config
        h = BlockHash(self.dim, c.rows, c.cols, self.ranks, c.seed, self.steps)
        self.steps += 1
        every = np.arange(self.dim)
        cells = [list(zip(*h.cells(j, every), strict=True)) for j in range(c.rows)]
        signs = [h.signs(j, every).tolist() for j in range(c.rows)]
        table: list[dict] = [{} for _ in range(c.rows)]
        for v, gradient in zip(self.v, gradients, strict=True):
            for i, g in enumerate(gradient):
                v[i] += g
                for j in range(c.rows):
                    table[j][cells[j][i]] = table[j].get(cells[j][i], 0.0) + signs[j][i] * v[i]
        estimate = [median(signs[j][i] * table[j][cells[j][i]] for j in range(c.rows)) for i in range(self.dim)]
        candidates = from_the_edge(estimate, c.candidate_count(self.dim))
        exact = {i: sum(v[i] for v in self.v) for i in candidates}
        chosen = sorted((i for i in candidates if exact[i]), key=lambda i: (-abs(exact[i]), i))[: c.k]
        for v in self.v:
            for i in chosen:
                v[i] = 0.0
        return {i: exact[i] / self.ranks for i in sorted(chosen)}
