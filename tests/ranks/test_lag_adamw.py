"""LagAdamW under DistributedOptimizer: told what is sparse, equal on all ranks, AdamW where all arrives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hvd_sketch import LowRankConfig, Simulation, SketchConfig, broadcast_optimizer_state
from hvd_sketch.config import Compression
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.optim import LagAdamW
from hvd_sketch.simulate import train
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, assert_all_equal

SPARSE = [SketchConfig(k=20, cols=60, dense_below=64), SketchConfig(k=40, candidates="nominate", dense_below=64)]
ALL_ARRIVE: list[Compression | None] = [None, LowRankConfig(rank=2, dense_below=64)]
RANKS, STEPS = 3, 25


def classifier() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    draw = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 4
    return model


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(100 * rank + step))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), inputs[:, :5].argmax(1))


def wrapped(model: nn.Module, kind: type, config: Compression | None, transport: LocalTransport) -> Any:
    inner = kind(model.parameters(), lr=0.02)
    return DistributedOptimizer(inner, model.named_parameters(), config, transport, check_every=5)


def run(model: nn.Module, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()


def train_rank(transport: LocalTransport, kind: type, config: Compression | None) -> list[Tensor]:
    model = classifier()
    optimizer = wrapped(model, kind, config, transport)
    run(model, optimizer, transport.rank, range(STEPS))
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("config", ALL_ARRIVE)
def test_equals_adamw_where_every_coordinate_arrives(config: Compression | None) -> None:
    ours = run_local(RANKS, lambda transport: train_rank(transport, LagAdamW, config), LIMIT_S)
    theirs = run_local(RANKS, lambda transport: train_rank(transport, AdamW, config), LIMIT_S)
    for a, b in zip(ours, theirs, strict=True):
        assert_all_equal(a, b)


@pytest.mark.parametrize("config", SPARSE)
def test_all_ranks_get_equal_parameters_and_simulated_ones_the_same(config: SketchConfig) -> None:
    first, *others = run_local(RANKS, lambda transport: train_rank(transport, LagAdamW, config), LIMIT_S)
    for other in others:
        assert_all_equal(first, other)
    with_adamw = run_local(RANKS, lambda transport: train_rank(transport, AdamW, config), LIMIT_S)[0]
    assert not torch.equal(first[0], with_adamw[0])
    model = classifier()
    optimizer = LagAdamW(model.parameters(), lr=0.02)
    batches = [batch(rank, step) for step in range(STEPS) for rank in range(RANKS)]
    simulation = Simulation(model.named_parameters(), config, RANKS)
    assert len(list(train(model, optimizer, simulation, loss_of, batches))) == STEPS
    assert_all_equal(first, [parameter.detach() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("config", "marked"), [(SPARSE[0], True), (SPARSE[1], True), *((c, False) for c in ALL_ARRIVE)]
)
def test_only_what_is_exchanged_a_few_coordinates_at_a_time_is_sparse(config: Any, marked: bool) -> None:
    def states(transport: LocalTransport) -> list[bool]:
        model = classifier()
        optimizer = wrapped(model, LagAdamW, config, transport)
        loss_of(model, batch(transport.rank, 0)).backward()
        optimizer.step()
        return ["last_step" in optimizer.state[parameter] for parameter in model.parameters()]

    expected = [marked and parameter.ndim > 1 for parameter in classifier().parameters()]
    assert run_local(2, states, LIMIT_S) == [expected] * 2


def test_goes_on_from_each_ranks_checkpoint_and_from_the_roots(tmp_path: Path) -> None:
    config = SPARSE[1]

    def resume(transport: LocalTransport) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        models = [classifier() for _ in range(3)]
        optimizers = [wrapped(model, LagAdamW, config, transport) for model in models]
        run(models[0], optimizers[0], transport.rank, range(10))
        saved = optimizers[0].state_dict(), models[0].state_dict()
        torch.save(saved, path := tmp_path / str(transport.rank))
        state, weights = torch.load(path, weights_only=True)
        models[1].load_state_dict(weights)
        optimizers[1].load_state_dict(state)
        if transport.rank == 0:
            optimizers[2].load_state_dict(torch.load(path, weights_only=True)[0])
        broadcast_optimizer_state(optimizers[2], 0, transport)
        for model, optimizer in zip(models[:2], optimizers[:2], strict=True):
            run(model, optimizer, transport.rank, range(10, 15))
        moments = [optimizers[2].state[p]["last_step"].float() for p in models[2].parameters() if p.ndim > 1]
        return *([p.detach() for p in model.parameters()] for model in models[:2]), moments

    results = run_local(RANKS, resume, LIMIT_S)
    for went_on, resumed, moments in results:
        assert_all_equal(went_on, resumed)
        assert_all_equal(moments, results[0][2])
        assert any(last_steps.any() for last_steps in moments)


def test_is_adamw_where_two_levels_have_but_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_SKETCH_HOST", "one")

    def main(transport: LocalTransport, kind: type) -> list[Tensor]:
        model = classifier()
        inner = kind(model.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), SPARSE[0], transport, levels=2)
        run(model, optimizer, transport.rank, range(STEPS))
        return [parameter.detach() for parameter in model.parameters()]

    lag, adam = (run_local(2, partial(main, kind=kind), LIMIT_S)[0] for kind in (LagAdamW, AdamW))
    assert_all_equal(lag, adam)
