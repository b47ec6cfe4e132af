"""Candidates at random, the same on every rank: nothing is sent to find them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.hashing import Purpose, random_words
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.staging import to_device

CHUNK = 1 << 14  # strata at a time: what they need stays in a cache


class RandomCandidates:
    """One coordinate of each of ``P * k`` strata of equal length, drawn uniformly from ``(seed, step)``.

    Every coordinate has the same chance in every step. It is the control that any choice by size must beat.

    Args: see :mod:`hvd_sketch.exchange.candidates`. Communication: none.
    """

    sketch = None

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device) -> None:
        self.predictor = ThresholdPredictor()
        self._count, self._dim, self._seed = config.candidate_count(dim), dim, config.seed
        self._device = device
        self._step = 0

    def begin(self, step: int) -> None:
        self._step = step

    def find(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        return self.draw()

    def draw(self) -> Tensor:
        """The step's candidates, see :meth:`find`. Communication: none."""
        words = random_words(self._seed, self._step, Purpose.RANDOM)
        drawn = np.empty(self._count, dtype=np.int64)
        for start in range(0, self._count, CHUNK):  # at a ratio of 60 whole vectors would take 7 bytes per parameter
            stop = min(start + CHUNK, self._count)
            bounds = np.arange(start, stop + 1, dtype=np.int64) * self._dim // self._count
            widths = np.diff(bounds).astype(np.uint64)
            upper = words.random_raw(stop - start) >> np.uint64(32)
            # Uniform up to a bias of width * 2^-32.
            drawn[start:stop] = bounds[:-1] + ((upper * widths) >> np.uint64(32)).astype(np.int64)
        return to_device(torch.from_numpy(drawn), self._device)
