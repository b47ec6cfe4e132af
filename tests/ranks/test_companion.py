"""The dense tensors of a model travel in the collectives of its compressed ones, which changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange import dense
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, RANKS

WIDTH = 100
STEPS = 8
LARGEST = torch.finfo(torch.float32).max

# How to compress, and how many collectives a step then has once thresholds are predicted.
SETTINGS: dict[str, tuple[Compression, int]] = {
    "paper, all sums travel": (SketchConfig.paper(cols=600, k=30, momentum=0.5), 6),
    "paper, owners choose": (SketchConfig.paper(cols=600, k=1000, momentum=0.0), 6),
    "sketch": (SketchConfig(cols=600, k=300), 5),
    "nominate": (SketchConfig(k=300, candidates="nominate"), 3),
    "nominate in 32 bits": (SketchConfig(k=300, candidates="nominate", value_bits=32), 3),
    "random": (SketchConfig(k=300, candidates="random"), 2),
    "low rank": (LowRankConfig(rank=2, dense_below=1024), 5),
    "low rank in 32 bits": (LowRankConfig(rank=2, value_bits=32, dense_below=1024), 5),
}


def train(transport: LocalTransport, config: Compression, beside: bool, bias_factor: float) -> tuple[Tensor, list[int]]:
    """All averaged gradients of some steps, and how many collectives each step had."""
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), config, transport, check_every=0
    )
    assert optimizer.exchange is not None and optimizer.exchange.companion is not None
    if not beside:
        optimizer.exchange.companion = None
    generator = torch.Generator().manual_seed(transport.rank)
    seen, collectives = [], []
    for _ in range(STEPS):
        model.weight.grad = torch.randn(WIDTH, WIDTH, generator=generator) ** 3
        model.bias.grad = torch.rand(WIDTH, generator=generator) * bias_factor
        before = optimizer.ledger.totals().collectives
        optimizer.step()
        collectives.append(optimizer.ledger.totals().collectives - before)
        seen += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(seen), collectives


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SETTINGS)
def test_travelling_together_changes_no_bit_and_saves_collectives(name: str, ranks: int) -> None:
    config, expected = SETTINGS[name]
    together = run_local(ranks, lambda t: train(t, config, True, 1.0), LIMIT_S)
    apart = run_local(ranks, lambda t: train(t, config, False, 1.0), LIMIT_S)
    assert all(torch.equal(gradients, apart[0][0]) for gradients, _ in together + apart)
    assert min(together[0][1]) == expected, "collectives of a step whose thresholds were predicted"
    assert [count + 2 for count in together[0][1]] == apart[0][1]


@pytest.mark.parametrize("name", ["sketch", "random", "paper, owners choose", "low rank"])
def test_a_sum_beside_may_overflow_where_the_mean_does_not(name: str) -> None:
    results = run_local(3, lambda t: train(t, SETTINGS[name][0], True, LARGEST), LIMIT_S)
    assert bool(torch.isfinite(results[0][0]).all()) and float(results[0][0].max()) > LARGEST / 10
    assert torch.equal(results[0][0], results[2][0])


def test_a_large_dense_part_travels_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MOST_BESIDE", WIDTH - 1)
    assert run_local(2, lambda t: train(t, SETTINGS["nominate"][0], True, 1.0), LIMIT_S)[0][1] == [5] * STEPS
