"""State of a DistributedOptimizer: resumed to the bit, loaded at other world sizes, refused where it does not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from hvd_sketch.config import Compression, LowRankConfig
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
    caplog.clear()  # of the warning about Adam
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


LOW_RANK = LowRankConfig(rank=1, dense_below=8)
# What is changed in the state of the optimizer, and what the error then says.
DAMAGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("v of one element", lambda s: ours(s).update(v=torch.ones(1)), r"'v' .* float32 of shape \(60,\), got .*\(1,\)"),
    ("v of two dimensions", lambda s: ours(s).update(v=torch.ones(1, 60)), r"'v' .* got float32 of shape \(1, 60\)"),
    ("v in float64", lambda s: ours(s).update(v=ours(s)["v"].double()), "'v' .* got float64"),
    (
        "NaN in v",
        lambda s: ours(s)["v"].__setitem__(41, float("nan")),
        "'v' .*finite.* 1 of 60 .* element 1 of 'other'",
    ),
    ("Inf in v", lambda s: ours(s)["v"].__setitem__(3, float("inf")), "'v' .* first at element 3 of 'weight'"),
    ("v is missing", lambda s: ours(s).pop("v"), "'v' .* must be there, got the entries 'dim'"),
    ("v is a number", lambda s: ours(s).update(v=3.0), "'v' .* got 3.0"),
    ("the step is missing", lambda s: ours(s).pop("step"), "'step' .* must be there"),
    ("the step is negative", lambda s: ours(s).update(step=-1), "'step' .* integer of at least 0, got -1"),
    ("the rank is text", lambda s: ours(s).update(rank="0"), "'rank' .* integer of at least 0, got '0'"),
    ("the dim is missing", lambda s: ours(s).pop("dim"), "'dim' .* must be there"),
    ("the dim is another", lambda s: ours(s).update(dim=61), "of dim 61, this exchange of dim 60"),
    ("nothing is sketched", lambda s: s["hvd_sketch"].update(sketched=None), "'sketched' .* Mapping, got None"),
    ("the dense part is at no step", lambda s: s["hvd_sketch"]["dense"].update(step=-1), "'step' .* got -1"),
    ("the dense part is missing", lambda s: s["hvd_sketch"].update(dense=None), "'dense' .* Mapping, got None"),
    ("the layout is missing", lambda s: s["hvd_sketch"].pop("layout"), "'layout' .* must be there"),
    ("all of it is None", lambda s: s.update(hvd_sketch=None), "must be a dict, got NoneType"),
    ("the groups are missing", lambda s: s.pop("param_groups"), "'param_groups' .* must be there"),
]
OF_SKETCH = [
    ("NaN in u", lambda s: ours(s)["u"].__setitem__(0, float("nan")), "'u' .*finite.* element 0 of 'weight'"),
    ("u is missing", lambda s: ours(s).pop("u"), "'u' .* must be there"),
    ("thresholds are cut", lambda s: ours(s).update(thresholds=ours(s)["thresholds"][:1]), "'thresholds' .* 2 pairs"),
    ("thresholds are missing", lambda s: ours(s).pop("thresholds"), "'thresholds' .* must be there"),
]
OF_LOW_RANK = [
    ("right of one element", lambda s: ours(s).update(right=torch.ones(1)), r"'right' .* got float32 of shape \(1,\)"),
    ("NaN in right", lambda s: ours(s)["right"].fill_(float("nan")), "'right' .* must be finite"),
    ("matrices are missing", lambda s: ours(s).pop("matrices"), "'matrices' .* must be there"),
]


def ours(state: dict[str, Any]) -> dict[str, Any]:
    return state["hvd_sketch"]["sketched"]


@pytest.mark.parametrize(
    ("sketch", "change", "told"),
    [
        *(pytest.param(little(momentum=0.5), *rest, id=f"sketch: {what}") for what, *rest in [*DAMAGES, *OF_SKETCH]),
        *(pytest.param(LOW_RANK, *rest, id=f"low rank: {what}") for what, *rest in [*DAMAGES, *OF_LOW_RANK]),
    ],
)
def test_damaged_state_is_refused_before_anything_is_loaded(
    sketch: Compression, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    model = Toy()
    optimizer = DistributedOptimizer(SGD(model.parameters(), lr=1.0), model.named_parameters(), sketch, alone())
    train(alone(), optimizer, model, range(3))
    state = through_a_file(optimizer.state_dict())
    change(state)
    train(alone(), optimizer, model, range(3, 4))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=told) as caught:
        optimizer.load_state_dict(state)
    assert "of dim" in told or "load another one; to go on with residuals of zero" in str(caught.value)
    after = optimizer.state_dict()
    assert torch.equal(ours(before)["v"], ours(after)["v"]) and ours(before)["step"] == ours(after)["step"] == 4


@pytest.mark.parametrize("damage", [lambda s: s["param_groups"].pop(), lambda s: s["param_groups"][0].pop("params")])
def test_a_damaged_state_of_the_wrapped_optimizer_leaves_residuals_alone(damage: Callable[[Any], object]) -> None:
    model = Toy()
    optimizer = DistributedOptimizer(SGD(model.parameters(), lr=1.0), model.named_parameters(), little(), alone())
    state = through_a_file(optimizer.state_dict())
    damage(state)
    train(alone(), optimizer, model, range(3))
    before = optimizer.state_dict()
    with pytest.raises((KeyError, ValueError)):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert torch.equal(ours(before)["v"], ours(after)["v"]) and ours(after)["step"] == 3


@pytest.mark.parametrize(("u", "told"), [(torch.ones(1), "float32 of shape"), (torch.full((3,), torch.nan), "finite")])
def test_damaged_momentum_of_dense_tensors_is_refused(u: Tensor, told: str) -> None:
    optimizer = adam(alone(), Toy())
    state = optimizer.state_dict()
    state["hvd_sketch"]["dense"]["u"] = u
    with pytest.raises(ValueError, match=f"'u' .* must be {told}"):
        optimizer.load_state_dict(state)
