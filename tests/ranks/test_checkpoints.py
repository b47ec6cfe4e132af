"""State of a DistributedOptimizer: resumed to the bit, loaded at other world sizes, refused where it does not fit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, RANKS, Toy, alone, assert_all_equal, little


def train(transport: LocalTransport, optimizer: DistributedOptimizer, model: Toy, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adam(transport: LocalTransport, model: nn.Module, **settings: Any) -> DistributedOptimizer:
    inner = Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9))
    return DistributedOptimizer(inner, model.named_parameters(), little(momentum=0.5, **settings), transport)


@pytest.mark.parametrize("ranks", RANKS)
def test_resuming_local_state_is_bitwise(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> None:
        model = Toy()
        optimizer = adam(transport, model)
        train(transport, optimizer, model, range(3))
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(transport, optimizer, model, range(3, 6))

        resumed = Toy()
        resumed.load_state_dict(saved["model"])
        again = adam(transport, resumed)
        again.load_state_dict(saved["optimizer"])
        train(transport, again, resumed, range(3, 6))
        assert_all_equal(list(resumed.parameters()), list(model.parameters()))
        assert_all_equal([again.exchange.residual, again.exchange.velocity],
                         [optimizer.exchange.residual, optimizer.exchange.velocity])  # fmt: skip
        assert bool(again.exchange.residual.any())

    run_local(ranks, rank_main, LIMIT_S)


@pytest.mark.parametrize("after", RANKS)
def test_consolidated_state_loads_at_any_world_size(after: int) -> None:
    def save(transport: LocalTransport) -> tuple[dict[str, Any], Tensor]:
        model = Toy()
        optimizer = adam(transport, model)
        train(transport, optimizer, model, range(3))
        return through_a_file(optimizer.state_dict(consolidated=True)), optimizer.exchange.residual

    def load(transport: LocalTransport) -> Tensor:
        model = Toy()
        optimizer = adam(transport, model)
        optimizer.load_state_dict(copy.deepcopy(saved[0][0]))  # torch's optimizers keep the tensors that they load
        mean = optimizer.exchange.residual.clone()
        train(transport, optimizer, model, range(3, 5))
        return mean

    saved = run_local(4, save, LIMIT_S)
    expected = sum(residual for _, residual in saved) / 4
    assert all(torch.equal(mean, expected) for mean in run_local(after, load, LIMIT_S))


def test_local_state_is_refused_on_another_rank() -> None:
    states = run_local(2, lambda t: adam(t, Toy()).state_dict(), LIMIT_S)

    def swap(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match="consolidated=True"):
            adam(transport, Toy()).load_state_dict(states[1 - transport.rank])

    run_local(2, swap, LIMIT_S)


def test_state_of_a_plain_optimizer_loads_with_a_warning_and_ours_into_a_plain_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Toy()
    plain = Adam(model.parameters(), lr=0.3)
    model.backward(0, 0)
    plain.step()
    trained = Toy()
    optimizer = adam(alone(), trained)
    train(alone(), optimizer, trained, range(2))
    kept = [optimizer.exchange.residual, optimizer.exchange.velocity, optimizer._gradients._exchanges[1].velocity]
    assert all(map(Tensor.any, kept))
    optimizer.load_state_dict(plain.state_dict())
    assert len(caplog.messages) == 1 and "residuals start from zero" in caplog.text
    assert not any(map(Tensor.any, kept))
    assert optimizer.param_groups[0]["lr"] == 0.3
    back = Adam(Toy().parameters())
    back.load_state_dict(optimizer.state_dict())
    assert back.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("change", [{"dense_below": 21}, {"name": "wider"}])
def test_state_saved_for_other_tensors_is_refused(change: dict[str, Any]) -> None:
    model = Toy()
    state = adam(alone(), model).state_dict()
    if "name" in change:
        named = [(change["name"] if n == "other" else n, p) for n, p in model.named_parameters()]
        other = DistributedOptimizer(Adam(model.parameters()), named, little(), alone())
    else:
        other = adam(alone(), model, **change)
    with pytest.raises(ValueError, match=r"tensor 1 is \['sketched', 'other', \[2, 2, 5\]\] there"):
        other.load_state_dict(state)
