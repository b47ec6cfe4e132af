"""What travels with the agreement before a step: the same update as without, and no trace of a step that is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.agreement import Report
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.transport import LocalTransport, run_local

DIM = 3001
CONFIGS: dict[str, dict[str, Any]] = {
    "nominate": {"k": 90, "candidates": "nominate"},
    "nominate, 32 bits": {"k": 90, "candidates": "nominate", "value_bits": 32},
    "random": {"k": 200, "candidates": "random"},
}
every_source = pytest.mark.parametrize("source", CONFIGS)


def build(source: str, transport: LocalTransport, dim: int = DIM, **settings: Any) -> SketchedAllreduce:
    return SketchedAllreduce(SketchConfig(**CONFIGS[source], **settings), dim, transport)


def gradient(rank: int, step: int, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(dim, generator=generator) ** 3


def slices(values: Tensor) -> list[Tensor]:
    return list(values.split([1000, 1, 2000]))


@every_source
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_update_is_that_of_an_agreement_on_its_own(source: str, ranks: int) -> None:
    def main(transport: LocalTransport) -> None:
        along, alone, late = (build(source, transport) for _ in range(3))
        for step in range(4):
            given = gradient(transport.rank, step)
            update = along.step(slices(given))
            alone.accumulate(slices(given))
            expected = alone.agree()
            late.accumulate(slices(given))  # as in a simulation
            assert late.begin_step(Report()).goes_on
            for other in (expected, late.agree()):
                assert torch.equal(update.indices, other.indices)
                assert torch.equal(update.values, other.values)
            assert torch.equal(along.residual, alone.residual)
            assert torch.equal(along.residual, late.residual)

    run_local(ranks, main, timeout_s=60)


@every_source
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_a_step_that_is_skipped_leaves_no_trace(source: str) -> None:
    def main(transport: LocalTransport) -> None:
        exchange, other = build(source, transport), build(source, transport)
        exchange.step(gradient(transport.rank, 0))
        other.step(gradient(transport.rank, 0))
        before = exchange.residual.clone()
        broken = gradient(transport.rank, 1)
        if transport.rank == 1:
            broken[5] = float("inf")
        assert exchange.step(broken).skipped
        assert torch.equal(exchange.residual, before)
        other.count_step()
        update, expected = (each.step(gradient(transport.rank, 2)) for each in (exchange, other))
        assert torch.equal(update.indices, expected.indices) and torch.equal(update.values, expected.values)

    run_local(3, main, timeout_s=60)


@every_source
def test_one_rank_refuses_and_all_raise(source: str) -> None:
    def main(transport: LocalTransport) -> str:
        exchange = build(source, transport)
        length = DIM - (transport.rank == 1)
        with pytest.raises((RuntimeError, ValueError)) as caught:
            exchange.step(torch.ones(length))
        return str(caught.value)

    assert all("must be float32 of shape (3001,)" in told for told in run_local(3, main, timeout_s=60))


@every_source
def test_a_fresh_rank_takes_over_the_step_and_what_it_sent_before_is_not_used(source: str) -> None:
    """Rank 1 comes at step 0, where other coordinates would be drawn, to ranks at step 2."""

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        exchange = build(source, transport)
        if transport.rank != 1:
            state = exchange.state_dict()
            state["step"] = 2
            exchange.load_state_dict(state)
        own = gradient(transport.rank, 2)
        update = exchange.step(own)
        assert exchange.step_number == 3
        full = torch.zeros(DIM).index_copy_(0, update.indices, update.values)
        return full, exchange.residual.clone(), own

    results = run_local(3, main, timeout_s=60)
    assert all(torch.equal(update, results[0][0]) for update, _, _ in results)
    kept, produced = (sum(result[i] for result in results) for i in (1, 2))
    assert torch.allclose(results[0][0] * 3 + kept, produced, atol=1e-4)


@every_source
def test_what_overflows_in_the_residual_is_reset(source: str) -> None:
    def main(transport: LocalTransport) -> Tensor:
        exchange = build(source, transport)
        exchange.residual.fill_(3e38)
        update = exchange.step(torch.full((DIM,), 3e38))
        assert bool(torch.isfinite(update.values).all())
        assert bool(torch.isfinite(exchange.residual).all()) and exchange.reset_coordinates > 0
        return update.values

    assert all(bool((values == 0).all()) for values in run_local(2, main, timeout_s=60))


@every_source
def test_ranks_that_use_different_parameters_agree_and_lose_nothing(source: str) -> None:
    """Each rank names coordinates of what it uses; what no rank uses stays as it is."""

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        named = [(f"expert {i}", torch.nn.Parameter(torch.zeros(40, 50))) for i in range(4)]
        config = SketchConfig(**CONFIGS[source])
        gradients = GradientExchange(named, config, transport, check_every=0)
        exchange = gradients.compressed
        assert exchange is not None
        exchange.residual[6000:] = 50.0  # of the parameter that nobody uses in these steps
        sent, produced = torch.zeros(2, 8000)
        for step in range(5):
            for number, (_, parameter) in enumerate(named):
                is_used = number == transport.rank or number == (transport.rank + step) % 3
                parameter.grad = None
                if is_used and number < 3:
                    own = gradient(transport.rank, 10 * step + number, 2000)
                    parameter.grad = own.view(40, 50).clone()
                    produced[2000 * number : 2000 * (number + 1)] += own
            assert gradients.average()
            assert named[3][1].grad is None
            sent += torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(2000) for _, p in named])
        assert bool((exchange.residual[6000:] == 50.0).all())
        return sent, exchange.residual[:6000].clone(), produced[:6000]

    results = run_local(3, main, timeout_s=60)
    assert all(torch.equal(sent, results[0][0]) for sent, _, _ in results)
    kept, produced = (sum(result[i] for result in results) for i in (1, 2))
    assert torch.allclose(results[0][0][:6000] * 3 + kept, produced, atol=1e-3)


def test_with_momentum_the_agreement_travels_alone() -> None:
    def main(transport: LocalTransport) -> set[str]:
        exchange = build("nominate", transport, momentum=0.5)
        exchange.step(gradient(transport.rank, 0))
        return {f"{record.phase} {record.collective}" for record in exchange.ledger.records}

    assert "agree allreduce" in run_local(2, main, timeout_s=60)[0]
