"""Exchanging every H steps: equal to training together where it must be, nothing lost, rounds that are thrown away."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import (
    DistributedOptimizer,
    LocalSteps,
    LowRankConfig,
    SketchConfig,
    broadcast_optimizer_state,
    broadcast_parameters,
    load_checkpoint,
    save_checkpoint,
)
from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import Report
from hvd_sketch.transport import LocalTransport, Transport, local_transports, run_local
from tests.support.toy import LIMIT_S, RANKS
from tests.support.worlds import register

COMPRESSIONS: dict[str, Compression | None] = {
    "dense": None,
    "sketch": SketchConfig(cols=400, k=100),
    "nominate": SketchConfig(k=200, candidates="nominate"),
    "random": SketchConfig(k=400, candidates="random"),
    "low rank": LowRankConfig(rank=2, dense_below=1024),
}
plain_outer = partial(torch.optim.SGD, lr=1.0)


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 40))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


def backward(model: nn.Module, rank: int, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    (model(torch.randn(8, 30, generator=generator)).square().mean() * scale).backward()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def wrap(transport: Transport, model: nn.Module, compression: Compression | None, **options: Any) -> LocalSteps:
    inner = options.pop("inner", adam)(model)
    return LocalSteps(inner, model.named_parameters(), compression, transport, **options)


def train(model: nn.Module, optimizer: LocalSteps, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def trained(transport: Transport, name: str, steps: int = 12, every: int = 4) -> Tensor:
    model = network()
    train(model, wrap(transport, model, COMPRESSIONS[name], every=every), transport.rank, range(steps))
    return flat(model.parameters())


# --- training


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


MPI_JOBS = {name: register("mpi", 2, "tests.ranks.test_local_steps:trained", name=name) for name in COMPRESSIONS}


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


def test_parameters_that_come_later_are_refused_on_every_rank() -> None:
    def main(transport: LocalTransport) -> list[str]:
        model = network()
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        optimizer = wrap(transport, model, COMPRESSIONS["nominate"], every=2)
        train(model, optimizer, transport.rank, range(2))
        model[0].weight.requires_grad_(transport.rank == 1)
        with pytest.raises(RuntimeError, match="began to require a gradient, after wrapping") as later:
            train(model, optimizer, transport.rank, range(2, 4))
        with pytest.raises(RuntimeError, match="parameters cannot be added to a LocalSteps") as added:
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        return [str(later.value), str(added.value)]

    for later, added in run_local(2, main, LIMIT_S):
        assert "rank 1 of 2 cannot take this step" in later or "parameter.0.0 came to the optimizer" in later
        assert "wrap it then" in later and "wrap it then" in added


def test_a_state_of_one_rank_within_a_round_is_not_given_to_all() -> None:
    def main(transport: LocalTransport) -> str:
        model = network()
        optimizer = wrap(transport, model, None, every=3)
        if transport.rank == 0:
            train(model, optimizer, 0, range(2))
        with pytest.raises(ValueError, match="within a round, after 2 of 3 steps") as raised:
            broadcast_optimizer_state(optimizer, 0, transport)
        return str(raised.value)

    assert all("call sync() before" in told for told in run_local(2, main, LIMIT_S))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda t, m: LocalSteps("adam", m.named_parameters(), None, t, every=2), "must be a torch.optim.Optimizer"),
        (lambda t, m: wrap(t, m, None, every=0), "every must be an integer of at least 1, got 0"),
        (lambda t, m: wrap(t, m, None, every=2 + t.rank), "every: 2 on rank 0; 3 on rank 1"),
        (lambda t, m: wrap(t, m, SketchConfig.paper(cols=9, k=9), every=2), "must have no momentum"),
        (
            lambda t, m: wrap(t, m, SketchConfig(k=9, candidates="nominate", weight_decay=0.1), every=2),
            "no weight_decay",
        ),
        (lambda t, m: wrap(t, m, None, every=2, start_dtype=torch.int8), "start_dtype must be a floating-point"),
        (lambda t, m: wrap(t, m, 20, every=2), "must be a SketchConfig, a LowRankConfig, or None, got 20"),
        (lambda t, m: wrap(t, m, None, every=2, inner=lambda n: wrap(t, n, None, every=2)), "exchanges already"),
        (lambda t, m: DistributedOptimizer(wrap(t, m, None, every=2), transport=t), "exchanges gradients already"),
        (
            lambda t, m: wrap(t, m, None, every=2, outer=partial(torch.optim.SGD, lr=0.1 + t.rank)),
            r"lr of group 0 of the outer optimizer: 0\.1 on rank 0; 1\.1 on rank 1",
        ),
    ],
)
def test_refusals(make: Callable[[Transport, nn.Module], object], told: str) -> None:
    def main(transport: LocalTransport) -> None:
        with pytest.raises((TypeError, ValueError), match=told):
            make(transport, network())

    run_local(2, main, LIMIT_S)


# --- checkpoints


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = BytesIO()
    torch.save(state, file)
    return torch.load(BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_goes_on_from_a_file_to_the_bit_also_within_a_round(name: str, at: int) -> None:
    def main(transport: LocalTransport) -> None:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS[name], every=4)
        train(model, optimizer, transport.rank, range(at))
        state = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, transport.rank, range(at, 12))
        other = network()
        resumed = wrap(transport, other, COMPRESSIONS[name], every=4)
        other.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        train(other, resumed, transport.rank, range(at, 12))
        assert torch.equal(flat(model.parameters()), flat(other.parameters()))

    run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_job_goes_on_from_its_checkpoint_to_the_bit(ranks: int, tmp_path: Path) -> None:
    def main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model, other = network(), network()
        optimizer = wrap(transport, model, COMPRESSIONS["nominate"], every=4)
        train(model, optimizer, transport.rank, range(6))
        with pytest.raises(RuntimeError, match="call sync"):
            save_checkpoint(tmp_path, model, optimizer)
        optimizer.sync()
        save_checkpoint(tmp_path, model, optimizer)
        resumed = wrap(transport, other, COMPRESSIONS["nominate"], every=4)
        assert load_checkpoint(tmp_path, other, resumed) is not None
        train(model, optimizer, transport.rank, range(6, 12))
        train(other, resumed, transport.rank, range(6, 12))
        return flat(model.parameters()), flat(other.parameters())

    for went_on, resumed in run_local(ranks, main, LIMIT_S):
        assert torch.equal(went_on, resumed)


def test_a_consolidated_state_is_of_whole_rounds_and_goes_on_at_another_world_size() -> None:
    def save(transport: LocalTransport) -> dict[str, Any]:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS["nominate"], every=4)
        train(model, optimizer, transport.rank, range(6))
        with pytest.raises(RuntimeError, match="2 of 4 steps after an exchange they differ: call sync"):
            optimizer.state_dict(consolidated=True)
        assert optimizer.sync()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(consolidated=True)}

    states = run_local(2, save, LIMIT_S)

    def go_on(transport: LocalTransport) -> Tensor:
        model = network()
        optimizer = wrap(transport, model, COMPRESSIONS["nominate"], every=4)
        if transport.rank == 0:
            model.load_state_dict(states[0]["model"])
            optimizer.load_state_dict(states[0]["optimizer"])
        broadcast_parameters(model.state_dict(), 0, transport)
        broadcast_optimizer_state(optimizer, 0, transport)
        train(model, optimizer, transport.rank, range(6, 14))
        return flat(model.parameters())

    results = run_local(3, go_on, LIMIT_S)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: s["hvd_sketch_round"]["start"].__setitem__(1, torch.ones(1)),
            "'start 1' .* must be float32 of shape",
        ),
        (lambda s: s["hvd_sketch_round"]["start"][2].fill_(float("nan")), "'start 2' .* must be finite"),
        (lambda s: s["hvd_sketch_round"]["outer"]["param_groups"].pop(), "different number of parameter groups"),
        (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
        (lambda s: s["hvd_sketch"]["sketched"].update(v=torch.ones(1)), "'v' of the saved state must be float32"),
    ],
)
def test_of_a_damaged_state_nothing_is_loaded(change: Callable[[dict[str, Any]], object], told: str) -> None:
    def everything(optimizer: LocalSteps) -> list[Tensor]:
        state = optimizer.state_dict()
        outer = [each["momentum_buffer"] for each in state["hvd_sketch_round"]["outer"]["state"].values()]
        inner = [each["exp_avg"] for each in state["state"].values()]
        numbers = torch.tensor([state["hvd_sketch_round"]["done"], state["hvd_sketch"]["sketched"]["step"]])
        kept = [state["hvd_sketch"]["sketched"]["v"], numbers, *state["hvd_sketch_round"]["start"], *outer, *inner]
        return [tensor.clone() for tensor in kept]

    model = network()
    optimizer = wrap(local_transports(1)[0], model, COMPRESSIONS["nominate"], every=4)
    train(model, optimizer, 0, range(6))
    state = saved_and_loaded(optimizer.state_dict())
    change(state)
    train(model, optimizer, 0, range(6, 11))
    before = everything(optimizer)
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, everything(optimizer)))


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = network()
    optimizer = wrap(local_transports(1)[0], model, None, every=2)
    with pytest.raises(ValueError, match="'hvd_sketch_round' of the saved state must be there"):
        optimizer.load_state_dict(adam(model).state_dict())
