"""Simulated ranks equal real ones to the bit, and count the same bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import CommLedger, SketchConfig, rank_grid
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.simulate import Simulation, train
from hvd_sketch.transport import LocalTransport, run_local

STEPS = 5
# Few candidates, whose sums all travel, and many, among which owners choose; even and odd numbers of rows.
CASES: list[tuple[int, dict[str, Any]]] = [
    (1013, {"rows": 3, "cols": 160, "k": 40, "momentum": 0.9, "weight_decay": 0.1}),
    (40_007, {"rows": 4, "cols": 1201, "k": 3001, "oversample": 5, "momentum": 0.0}),
    (2501, {"rows": 5, "cols": 401, "k": 100, "candidates": "heavymix", "momentum": 0.0}),
]
FEW_BITS = {"cols": 1201, "k": 300, "oversample": 1, "momentum": 0.0, "value_bits": 4, "table_bits": 4}


class Model(nn.Module):
    """A large tensor, a small one that goes dense, and one that no gradient reaches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(dim, 1))
        self.small = nn.Parameter(torch.ones(7))
        self.unused = nn.Parameter(torch.ones(130, 1))

    def backward(self, rank: int, step: int) -> None:
        """Heavy-tailed gradients, then few whole numbers with ties and zeros, then nearly all zero."""
        draw = np.random.default_rng([4, step, rank])
        for parameter in (self.large, self.small):
            values = draw.standard_normal(tuple(parameter.shape)) ** 3
            if step == 2:
                values = (values / 4).round().clip(-2, 2)
            if step == 4:
                values.reshape(-1)[4:] = 0
            parameter.grad = torch.from_numpy(values.astype(np.float32))

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]


def simulate(simulation: Simulation, model: Model, steps: range) -> list[list[Tensor | None]]:
    updates = []
    for step in steps:
        for rank in range(simulation.ranks):
            model.backward(rank, step)
            simulation.accumulate(rank)
        simulation.agree()
        updates.append(model.gradients())
    return updates


def real(transport: LocalTransport, dim: int, config: SketchConfig | None) -> tuple[list, CommLedger, list[Tensor]]:
    model, updates = Model(dim), []
    exchange = GradientExchange(list(model.named_parameters()), config, transport, check_every=0)
    for step in range(STEPS):
        model.backward(transport.rank, step)
        exchange.average()
        updates.append(model.gradients())
    return updates, exchange.ledger, [own.residual.clone() for own in exchange._exchanges]


def equal(ours: list[list[Tensor | None]], theirs: list[list[Tensor | None]]) -> bool:
    pairs = [pair for step in zip(ours, theirs, strict=True) for pair in zip(*step, strict=True)]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def sizes(ledger: CommLedger) -> Counter[tuple[Any, ...]]:
    return Counter((r.step, r.phase, r.collective, r.dtype, r.payload_bytes, r.wire_bytes) for r in ledger.records)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "settings"), [*CASES, (300, None)])
def test_equals_real_ranks(dim: int, settings: dict[str, Any] | None, ranks: int) -> None:
    config = SketchConfig.paper(deterministic=True, seed=7, dense_below=100, **settings) if settings else None
    results = run_local(ranks, lambda transport: real(transport, dim, config), timeout_s=60)
    expected, ledger, _ = results[0]
    model = Model(dim)
    simulation = Simulation(model.named_parameters(), config, ranks)
    simulation.ledger.records = type(ledger.records)()  # which it does not keep
    assert equal(simulate(simulation, model, range(STEPS)), expected)
    for exchanges, (_, _, residuals) in zip(simulation._exchanges, results, strict=True):
        assert all(torch.equal(own.residual, kept) for own, kept in zip(exchanges, residuals, strict=True))
    assert sizes(simulation.ledger) == sizes(ledger)
    assert simulation.ledger.totals() == ledger.totals()
    assert simulation.ledger.compression_ratio() == ledger.compression_ratio()
    assert simulation.ledger.paper_compression_ratio() == ledger.paper_compression_ratio()


@pytest.mark.parametrize(("dim", "settings"), [*CASES, (40_007, FEW_BITS)])
def test_many_ranks_count_what_travels_twice_in_a_grid(
    dim: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SketchConfig.paper(**settings)

    def sent_bytes() -> int:
        model = Model(dim)
        simulation = Simulation(model.named_parameters(), config, 4)
        simulate(simulation, model, range(STEPS))
        return simulation.ledger.totals().wire_bytes

    direct = sent_bytes()
    monkeypatch.setattr(rank_grid, "GRID_RANKS", 4)
    assert sent_bytes() > direct
    test_equals_real_ranks(dim, settings, 4)


CONFIG = SketchConfig.paper(rows=3, cols=160, k=40, momentum=0.9, dense_below=100)


def test_goes_on_from_its_state_to_the_bit() -> None:
    model = Model(1013)
    whole = Simulation(model.named_parameters(), CONFIG, 3)
    expected = simulate(whole, model, range(STEPS))
    first, second = (Simulation(model.named_parameters(), CONFIG, 3) for _ in range(2))
    begun = simulate(first, model, range(2))
    second.load_state_dict(first.state_dict())
    assert equal(begun + simulate(second, model, range(2, STEPS)), expected)
    assert second.ledger.totals() == whole.ledger.totals()


def test_tied_weights_come_once() -> None:
    """Under two names, as from ``named_parameters(remove_duplicate=False)``."""
    model = Model(1013)
    named = list(model.named_parameters())
    once, twice = Simulation(named, CONFIG, 2), Simulation([*named, ("tied", named[0][1])], CONFIG, 2)
    assert equal(simulate(once, model, range(3)), simulate(twice, model, range(3)))
    assert once.ledger.totals() == twice.ledger.totals()


def test_misuse_is_refused() -> None:
    model = Model(1013)
    simulation = Simulation(model.named_parameters(), CONFIG, 2)
    model.backward(0, 0)
    with pytest.raises(ValueError, match="expected 0, got 1"):
        simulation.accumulate(1)
    simulation.accumulate(0)
    with pytest.raises(ValueError, match="only 1"):
        simulation.agree()
    model.small.grad = None
    with pytest.raises(ValueError, match=r"different parameters \(small\)"):
        simulation.accumulate(1)
    model.backward(1, 0)
    model.large.grad[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient of rank 1"):
        simulation.accumulate(1)
    with pytest.raises(ValueError, match="k must be at most dim"):
        Simulation(model.named_parameters(), SketchConfig.paper(cols=40, k=10_000, dense_below=100), 2)


def test_parameters_that_the_ranks_do_not_exchange_are_refused() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 1))
    model[0].requires_grad_(False)
    simulation = Simulation(model.named_parameters(), CONFIG, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(8, 40) for _ in range(2)]

    def loss_of(_: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    assert len(list(train(model, optimizer, simulation, loss_of, batches))) == 1
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="updates 2 parameters that the simulation was not given"):
        simulation.prepare(optimizer)
    loss_of(model, batches[0]).backward()
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias began to require a gradient"):
        simulation.accumulate(0)


def test_steps_ahead_are_of_the_optimizer_that_is_given() -> None:
    model = nn.Linear(40, 30)
    simulation = Simulation(model.named_parameters(), SketchConfig(k=50, candidates="nominate", dense_below=100), 2)
    first = torch.optim.AdamW(model.parameters(), lr=0.1)
    batches = [torch.randn(8, 40) for _ in range(8)]
    list(train(model, first, simulation, lambda m, batch: m(batch).square().mean(), batches, step_ahead=True))
    before = model.weight.detach().clone()
    with simulation.ahead(0, first):
        assert not torch.equal(model.weight, before)
    with simulation.ahead(0, torch.optim.AdamW(model.parameters(), lr=0.1)):
        assert torch.equal(model.weight, before), "without a state it does not know where it will come to"
    with pytest.raises(ValueError, match="got SGD"), simulation.ahead(0, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


def test_trains_any_model_on_batches_dealt_to_the_ranks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    batches = [torch.randn(8, 40) for _ in range(3 * 20 + 2)]  # the last two are too few for three ranks
    config = SketchConfig.paper(cols=300, k=200, momentum=0.0, dense_below=100)
    simulation = Simulation(model.named_parameters(), config, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = list(train(model, optimizer, simulation, lambda m, batch: m(batch).square().mean(), batches))
    assert len(losses) == 20 and all(len(of_step) == 3 for of_step in losses)
    assert sum(losses[-1]) < 0.5 * sum(losses[0])
    assert simulation.ledger.totals().steps == 20
