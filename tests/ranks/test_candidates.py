"""A candidate source of one's own: every rank names coordinates at random (the control "random k")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.config import SOURCES
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.transport import LocalTransport, run_local
from hvd_sketch.transport.metered import MeteredTransport
from tests.support.targets import integer_gradient


class RandomCandidates:
    """k / W coordinates that each rank draws for itself, and tells the others."""

    sketch = None

    def __init__(self, config: SketchConfig, dim: int, comm: MeteredTransport, device: torch.device) -> None:
        self.predictor = ThresholdPredictor()
        self._share, self._dim, self._comm = -(-config.k // comm.size), dim, comm
        self._step = 0

    def begin(self, step: int) -> None:
        self._step = step

    def find(self, v: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        draw = np.random.default_rng([self._comm.rank, self._step])
        own = torch.from_numpy(draw.choice(self._dim, self._share, replace=False))
        with self._comm.phase("indices"):
            return self._comm.allgather(own).unique()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_nothing_is_lost_with_candidates_of_ones_own(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "by each", f"{__name__}.RandomCandidates")
    dim, steps = 2003, 6

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        exchange = SketchedAllreduce(
            SketchConfig.paper(cols=8, k=60, momentum=0.0, candidates="by each"), dim, transport
        )
        sent = torch.zeros(dim)
        for step in range(steps):
            update = exchange.step(integer_gradient(dim, transport.rank, step))
            assert 0 < update.indices.numel() <= 60
            sent[update.indices] += update.values.mul(ranks).round()
        return sent, exchange.residual

    results = run_local(ranks, main, timeout_s=60)
    produced = sum(integer_gradient(dim, rank, step) for rank in range(ranks) for step in range(steps))
    assert all(torch.equal(sent, results[0][0]) for sent, _ in results)
    assert torch.equal(results[0][0] + sum(kept for _, kept in results), produced)
