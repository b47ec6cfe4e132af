"""``residual_decay``: a part of what waits is forgotten after every step that is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.feedback import LEAST_KEPT
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S

pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")
DIM, RANKS, DECAY = 900, 3, 0.75
SOURCES: list[dict[str, Any]] = [
    {"cols": 120},
    {"cols": 120, "value_bits": 32, "table_bits": 32, "momentum": 0.5},
    {"candidates": "nominate"},
    {"candidates": "random"},
    {"candidates": "heavymix", "cols": 120},
]


def gradient(rank: int, step: int) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(100 * rank + step))


@pytest.mark.parametrize("settings", SOURCES)
def test_equals_a_residual_that_is_multiplied_between_the_steps(settings: dict[str, Any]) -> None:
    def updates(transport: LocalTransport, decay: float, by_hand: float) -> list[Tensor]:
        config = SketchConfig(k=60, residual_decay=decay, **settings)
        exchange = SketchedAllreduce(config, DIM, transport)
        kept = []
        for step in range(6):
            update = exchange.step(gradient(transport.rank, step), finite=step != 3)
            if not update.skipped:
                exchange.residual.mul_(by_hand)
            kept += [update.values, exchange.residual.clone()]
        return kept

    ours = run_local(RANKS, lambda transport: updates(transport, DECAY, 1.0), LIMIT_S)
    expected = run_local(RANKS, lambda transport: updates(transport, 1.0, DECAY), LIMIT_S)
    for of_rank, of_expected in zip(ours, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_rank, of_expected, strict=True))
        assert of_rank[6].numel() == 0 and torch.equal(of_rank[7], of_rank[5])  # skipped: nothing is forgotten


def test_coordinates_without_a_gradient_forget_nothing() -> None:
    def residual(transport: LocalTransport) -> Tensor:
        exchange = SketchedAllreduce(SketchConfig(k=60, cols=120, residual_decay=0.5), DIM, transport)
        exchange.step(gradient(transport.rank, 0))
        before = exchange.residual.clone()
        exchange.begin_step(exchange._report_of([gradient(transport.rank, 1)], True))
        exchange.accumulate([gradient(transport.rank, 1)], unused=[(100, 400)])
        exchange.agree()
        return torch.stack([before, exchange.residual])

    for before, after in run_local(RANKS, residual, LIMIT_S):
        assert torch.equal(before[100:400], after[100:400])
        assert not torch.equal(before[:100], after[:100])


def test_what_comes_near_to_zero_becomes_zero() -> None:
    def residual(transport: LocalTransport) -> Tensor:
        exchange = SketchedAllreduce(SketchConfig(k=1, cols=30, residual_decay=0.5), DIM, transport)
        exchange.residual[:3] = torch.tensor([3 * LEAST_KEPT, -3 * LEAST_KEPT, 1.0])
        exchange.step(torch.ones(DIM) * (torch.arange(DIM) > 800))
        values = [exchange.residual[:3].clone()]
        exchange.step(torch.ones(DIM) * (torch.arange(DIM) > 800))
        return torch.stack([*values, exchange.residual[:3]])

    for first, second in run_local(1, residual, LIMIT_S):
        assert first.tolist() == pytest.approx([1.5 * LEAST_KEPT, -1.5 * LEAST_KEPT, 0.5])
        assert second.tolist() == [0.0, 0.0, 0.25]
