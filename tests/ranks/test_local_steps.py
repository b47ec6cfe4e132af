"""Exchanging every H steps: equal to training together where it must be, nothing lost, rounds that are thrown away."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.exchange.agreement import Report
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from tests.support.rounds import (
    COMPRESSIONS,
    backward,
    flat,
    network,
    plain_outer,
    saved_and_loaded,
    train,
    trained,
    wrap,
)
from tests.support.toy import LIMIT_S, RANKS
from tests.support.worlds import register


@pytest.mark.parametrize("ranks", RANKS)
def test_one_plain_step_and_a_plain_outer_one_are_averaged_sgd(ranks: int) -> None:
    def main(transport: LocalTransport) -> Tensor:
        model = network()
        inner = partial(torch.optim.SGD, lr=0.1)
        optimizer = wrap(transport, model, None, every=1, outer=plain_outer, inner=lambda m: inner(m.parameters()))
        train(model, optimizer, transport.rank, range(5))
        return flat(model.parameters())

    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        plain.zero_grad()
        for rank in range(ranks):
            backward(model, rank, step, 1 / ranks)
        plain.step()
    for result in run_local(ranks, main, LIMIT_S):
        torch.testing.assert_close(result, flat(model.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_are_equal_after_a_round_and_not_before(name: str, ranks: int) -> None:
    def main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=4)
        train(model, optimizer, transport.rank, range(7))
        within = flat(model.parameters())
        train(model, optimizer, transport.rank, range(7, 8))
        return within, flat(model.parameters())

    results = run_local(ranks, main, LIMIT_S)
    assert all(torch.equal(after, results[0][1]) for _, after in results)
    assert ranks == 1 or not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("name", ["dense", "nominate"])
def test_a_start_in_bfloat16_is_what_all_ranks_go_on_from(name: str) -> None:
    def main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model, other = network(), network()
        options: dict[str, Any] = {"every": 4, "start_dtype": torch.bfloat16, "start_device": "cpu"}
        optimizer, resumed = (wrap(transport, m, COMPRESSIONS[name], **options) for m in (model, other))
        train(model, optimizer, transport.rank, range(4))
        after = flat(model.parameters())
        train(model, optimizer, transport.rank, range(4, 6))
        state = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        start = state["optimizer"]["hvd_sketch_round"]["start"]
        assert {tensor.dtype for tensor in start} == {torch.bfloat16}
        assert torch.equal(flat(start), after.bfloat16()) and not torch.equal(flat(start).float(), after)
        other.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        for trained_on, of in ((model, optimizer), (other, resumed)):
            train(trained_on, of, transport.rank, range(6, 8))
        assert torch.equal(flat(model.parameters()), flat(other.parameters()))
        return flat(start), flat(model.parameters())

    results = run_local(3, main, LIMIT_S)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", ["sketch", "nominate", "random", "low rank"])
def test_nothing_is_lost(name: str) -> None:
    """What the ranks' steps changed is what the outer step changed, and what is left in the residuals."""
    ranks = 3

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=3, outer=plain_outer)
        compressed = [p for p in model.parameters() if p.ndim == 2]
        first, produced = flat(compressed), torch.zeros(30 * 50 + 50 * 40)
        average = optimizer._gradients.average

        def recorded(report: Report) -> bool:
            produced.add_(flat(p.grad for p in compressed))
            return average(report)

        optimizer._gradients.average = recorded
        train(model, optimizer, transport.rank, range(12))
        assert optimizer.exchange is not None
        return produced, optimizer.exchange.residual.clone(), first - flat(compressed)

    results = run_local(ranks, main, LIMIT_S)
    made, left = sum(produced for produced, _, _ in results), sum(residual for _, residual, _ in results)
    torch.testing.assert_close(results[0][2] * ranks + left, made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_frozen_layers_stand_still_and_lose_nothing(name: str) -> None:
    """Neither residuals nor the outer momentum move them, and both are there when they are trained again."""

    def main(transport: LocalTransport) -> Tensor:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=2)
        frozen = list(model[0].parameters())
        train(model, optimizer, transport.rank, range(4))
        before, others = flat(frozen), flat(model[2].parameters())
        kept = optimizer.state_dict()["hvd_sketch"]
        for parameter in frozen:
            parameter.requires_grad_(False)
        train(model, optimizer, transport.rank, range(4, 10))
        assert torch.equal(flat(frozen), before) and not torch.equal(flat(model[2].parameters()), others)
        if name != "dense":
            size = frozen[0].numel()  # biases go dense
            still = optimizer.state_dict()["hvd_sketch"]["sketched"]["v"]
            assert torch.equal(kept["sketched"]["v"][:size], still[:size]) and bool(still[:size].any())
        for parameter in frozen:
            parameter.requires_grad_(True)
        train(model, optimizer, transport.rank, range(10, 12))
        assert not torch.equal(flat(frozen), before)
        return flat(model.parameters())

    assert torch.equal(*run_local(2, main, LIMIT_S))


MPI_JOBS = {name: register("mpi", 2, "tests.support.rounds:trained", name=name) for name in COMPRESSIONS}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["sketch", "nominate", "random", "low rank"])
def test_processes_equal_threads(name: str) -> None:
    expected = run_local(2, lambda t: trained(t, name), LIMIT_S)[0]
    for ours in MPI_JOBS[name].results():
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(*MPI_JOBS[name].results())


def test_bytes_count_per_training_step() -> None:
    model, once = network(), network()
    optimizer = wrap(local_transports(1)[0], model, COMPRESSIONS["random"], every=8)
    each = wrap(local_transports(1)[0], once, COMPRESSIONS["random"], every=1)
    train(model, optimizer, 0, range(16))
    train(once, each, 0, range(16))
    assert optimizer.ledger.totals().steps == each.ledger.totals().steps == 16
    assert optimizer.ledger.compression_ratio() == pytest.approx(8 * each.ledger.compression_ratio(), rel=0.01)


@pytest.mark.parametrize("sync_every", [1, 2, 3, 4, 8])
def test_bytes_count_per_training_step_also_where_rounds_end_early(sync_every: int) -> None:
    model = network()
    optimizer = wrap(local_transports(1)[0], model, None, every=4)
    for step in range(16):
        train(model, optimizer, 0, range(step, step + 1))
        if step % sync_every == sync_every - 1:
            optimizer.sync()
    done = exchanges = 0
    for step in range(16):
        done += 1
        if done == 4 or step % sync_every == sync_every - 1:
            done, exchanges = 0, exchanges + 1
    assert optimizer.exchanges == exchanges and optimizer.ledger.totals().steps == 16
    assert optimizer.ledger.compression_ratio() == pytest.approx(16 / exchanges, rel=0.01)


@pytest.mark.parametrize("ranks", RANKS)
def test_between_rounds_sync_does_nothing(ranks: int) -> None:
    def main(transport: LocalTransport) -> bool:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS["low rank"], every=2, start_dtype=torch.bfloat16)
        assert optimizer.sync()
        train(model, optimizer, transport.rank, range(4))
        before, sent, ratio = flat(model.parameters()), optimizer.exchanges, optimizer.ledger.compression_ratio()
        backward(model, transport.rank, 5)
        assert optimizer.sync() and optimizer.sync() and optimizer.exchanges == sent == 2
        assert all(parameter.grad is None for parameter in model.parameters())
        assert optimizer.ledger.totals().steps == 4 and optimizer.ledger.compression_ratio() > 0.9 * ratio
        return torch.equal(flat(model.parameters()), before)

    assert all(run_local(ranks, main, LIMIT_S))


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("start_dtype", [None, torch.bfloat16])
def test_sync_waits_for_ranks_that_have_stepped_since(name: str, start_dtype: torch.dtype | None) -> None:
    """Rank 0 ends with a round; what the others did afterwards is exchanged, too, and ranks in join() go on."""

    def main(transport: LocalTransport) -> tuple[Tensor, int]:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=3, start_dtype=start_dtype)
        train(model, optimizer, transport.rank, range([3, 4, 5][transport.rank]))
        assert optimizer.sync()
        equal = flat(model.parameters())
        with optimizer.join():
            for round_ in range(3 if transport.rank else 1):
                train(model, optimizer, transport.rank, range(10 + 3 * round_, 13 + 3 * round_))
                optimizer.sync()  # where rank 0 has left, it must not take the others for out of data
        return torch.cat([equal, flat(model.parameters())]), optimizer.exchanges

    results = run_local(3, main, LIMIT_S)
    assert all(torch.equal(values, results[0][0]) and exchanges == 5 for values, exchanges in results)


# --- what goes wrong


@pytest.mark.parametrize("name", ["dense", "nominate"])
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_a_round_that_is_not_finite_is_thrown_away_everywhere(name: str) -> None:
    def main(transport: LocalTransport) -> tuple[bool, bool, bool, Tensor]:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=2)
        train(model, optimizer, transport.rank, range(2))
        before = flat(model.parameters())
        for step in range(2):
            optimizer.zero_grad()
            backward(model, transport.rank, step, float("nan") if (transport.rank, step) == (1, 0) else 1.0)
            optimizer.step()
        went_back, has_state = torch.equal(flat(model.parameters()), before), bool(optimizer.state)
        train(model, optimizer, transport.rank, range(2, 6))
        return went_back, has_state, optimizer.skipped_steps == 1, flat(model.parameters())

    results = run_local(3, main, LIMIT_S)
    assert [result[:3] for result in results] == [(True, True, True), (True, False, True), (True, True, True)]
    assert all(torch.equal(result[3], results[0][3]) for result in results)
    assert bool(torch.isfinite(results[0][3]).all())


def test_a_scaler_that_overflows_on_one_rank_keeps_the_rounds_together() -> None:
    def main(transport: LocalTransport) -> tuple[float, Tensor]:
        model = network()
        optimizer = wrap(transport, model, None, every=3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            factor = float("inf") if (transport.rank, step) == (1, 1) else 1.0
            backward(model, transport.rank, step, scaler.get_scale() * factor)
            scaler.scale(torch.zeros(()))  # makes the scale
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale(), flat(model.parameters())

    results = run_local(2, main, LIMIT_S)
    assert [scale for scale, _ in results] == [2.0**10, 2.0**9]
    assert torch.equal(results[0][1], results[1][1]) and bool(torch.isfinite(results[0][1]).all())


def test_ranks_with_different_numbers_of_batches() -> None:
    def main(transport: LocalTransport) -> Tensor:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS["nominate"], every=3)
        with optimizer.join():
            train(model, optimizer, transport.rank, range([10, 4, 6][transport.rank]))
        train(model, optimizer, transport.rank, range(20, 23))
        return flat(model.parameters())

    results = run_local(3, main, LIMIT_S)
    assert all(torch.equal(result, results[0]) for result in results)
