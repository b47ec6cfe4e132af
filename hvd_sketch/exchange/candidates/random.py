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
        words = random_words(self._seed, self._step, Purpose.RANDOM).random_raw(self._count)
        bounds = np.arange(self._count + 1, dtype=np.int64) * self._dim // self._count
        widths = np.diff(bounds).astype(np.uint64)
        drawn = ((words >> np.uint64(32)) * widths) >> np.uint64(32)  # uniform up to a bias of width * 2^-32
        return torch.from_numpy(bounds[:-1] + drawn.astype(np.int64)).to(self._device)
