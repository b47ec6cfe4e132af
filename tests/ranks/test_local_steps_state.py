"""Exchanging every H steps: how it goes on from what was saved, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import (
    DistributedOptimizer,
    LocalSteps,
    SketchConfig,
    broadcast_optimizer_state,
    broadcast_parameters,
    load_checkpoint,
    save_checkpoint,
)
from hvd_sketch.transport import LocalTransport, Transport, local_transports, run_local
from tests.support.rounds import COMPRESSIONS, adam, flat, network, saved_and_loaded, train, wrap
from tests.support.toy import LIMIT_S, RANKS


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
