"""LagAdamW: AdamW where every coordinate arrives in every step, its recurrence where sums arrive late."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.lag_adam import Settings, State, by_torch_, lag_adam_
from hvd_sketch.optim import LagAdamW
from tests.support.vectors import random_values

SIZES = (1, 31, 5000, 300_000)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    {"maximize": True, "foreach": True},
    {"lr": torch.tensor(0.003), "weight_decay": 0.0},
]


def a_model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def give_gradients(model: nn.Module, draw: torch.Generator, present: float = 1.0) -> None:
    """Random ones, in which each element is there with a probability of ``present``, and 0 otherwise."""
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=draw)
        is_there = torch.rand(parameter.shape, generator=draw) < present
        parameter.grad = torch.where(is_there, gradient, 0).to(parameter.dtype)


def run_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, present: float = 1.0
) -> None:
    draw = draws(seed)
    for _ in range(steps):
        give_gradients(model, draw, present)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_unmarked_parameters_are_stepped_as_by_adamw(options: dict[str, Any]) -> None:
    ours, theirs = (model := a_model()), deepcopy(model)
    optimizers = LagAdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        run_steps(model, optimizer, 20, present=0.5)  # zeros arrive, too
    assert same(ours, theirs)
    assert str(optimizers[0].state_dict()["state"]) == str(optimizers[1].state_dict()["state"])


def test_marked_parameters_of_which_all_arrives_follow_adamw_closely() -> None:
    """Only m is normalised earlier: with constant gradients there is no difference but rounding."""
    ours, theirs = (model := a_model()), deepcopy(model)
    optimizers = LagAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    optimizers[0].mark_sparse(ours.parameters())
    for _ in range(30):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(model, draws(3))
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_marked_parameters_of_which_all_arrives_have_adamws_second_moment() -> None:
    """The first one averages what is normalised already: with gradients that change the steps differ a little."""
    ours, theirs = (model := a_model()), deepcopy(model)
    optimizers = LagAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    optimizers[0].mark_sparse(ours.parameters())
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        run_steps(model, optimizer, 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        seconds = (optimizer.state[p]["exp_avg_sq"] for optimizer, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-8)
        assert 1e-4 < float((a - b).detach().abs().max()) < 30 * 0.01


def naive_step(w: float, x: float, state: dict[str, float], s: Settings) -> float:
    """The recurrence of the docstring, in Python's numbers."""
    state["m"] *= s.beta1
    if x != 0:
        tau = s.step - state["last"]
        state["b"] = s.beta2**tau * state["b"] + (1 - s.beta2**tau) * x * x / tau
        state["last"] = s.step
        state["m"] += (1 - s.beta1) * x / ((state["b"] / (1 - s.beta2**s.step)) ** 0.5 + s.eps)
    return w * (1 - s.rate * s.weight_decay) - s.rate / (1 - s.beta1**s.step) * state["m"]


@pytest.mark.parametrize("beta2", [0.999, 0.5, 0.0])
def test_marked_parameters_follow_the_recurrence(beta2: float) -> None:
    draw = draws()
    parameter = nn.Parameter(torch.randn(20, generator=draw).double())
    optimizer = LagAdamW([parameter], lr=0.01, betas=(0.9, beta2), weight_decay=0.1)
    optimizer.mark_sparse([parameter])
    expected, states = parameter.tolist(), [{"m": 0.0, "b": 0.0, "last": 0} for _ in range(20)]
    for step in range(1, 80):
        gradient = torch.randn(20, generator=draw).double()
        parameter.grad = torch.where(torch.rand(20, generator=draw) < 0.1, gradient, 0)
        settings = Settings(step, 0.01, 0.9, beta2, 1e-8, 0.1)
        optimizer.step()
        columns = zip(expected, parameter.grad.tolist(), states, strict=True)
        expected = [naive_step(w, x, state, settings) for w, x, state in columns]
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)
    assert optimizer.state[parameter]["last_step"].tolist() == [state["last"] for state in states]


def test_a_sum_over_tau_steps_counts_as_tau_steps() -> None:
    """b of sums of independent gradients is that of one step, and the sum moves sqrt(tau) times as far as one."""
    tau, draw = 25, draws()
    parameter = nn.Parameter(torch.zeros(4000))
    optimizer = LagAdamW([parameter], lr=1.0, betas=(0.0, 0.99), weight_decay=0.0)
    optimizer.mark_sparse([parameter])
    for step in range(1, 40 * tau + 1):
        gathered = torch.randn(4000, generator=draw) * tau**0.5
        before = parameter.detach().clone()
        parameter.grad = gathered if step % tau == 0 else torch.zeros(4000)
        optimizer.step()
    squares = optimizer.state[parameter]["exp_avg_sq"]
    assert abs(float(squares.mean()) - 1) < 0.05
    moved = (parameter.detach() - before).square().mean().sqrt()
    assert 0.8 < float(moved) / tau**0.5 < 1.25


def a_state(size: int, seed: int) -> tuple[Tensor, Tensor, State, Settings]:
    draw = draws(seed)
    parameter, moment, gradient = torch.randn(3, size, generator=draw)
    moment[: size // 2] *= 1e-29  # below the least
    gradient = torch.where(torch.rand(size, generator=draw) < 0.1, gradient, 0)
    last_step = torch.randint(0, 4000, (size,), generator=draw, dtype=torch.int32)
    state = State(moment, torch.rand(size, generator=draw), last_step)
    return parameter, gradient, state, Settings(4000, 0.01, 0.9, 0.99, 1e-8, 0.1, maximize=bool(seed % 2))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_has_the_reference_bits(size: int, threads: int) -> None:
    parameter, gradient, state, settings = a_state(size, size)
    expected, expected_state = parameter.clone(), State(*(tensor.clone() for tensor in state))
    by_torch_(expected, gradient, expected_state, settings)
    with mock.patch.object(cpu, "threads_for", return_value=threads):
        lag_adam_(parameter, gradient, state, settings)
    for ours, reference in zip((parameter, *state), (expected, *expected_state), strict=True):
        assert torch.equal(ours, reference)


def test_moments_become_zero_not_subnormal() -> None:
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = LagAdamW([parameter], betas=(0.5, 0.9))
    optimizer.mark_sparse([parameter])
    for gradient in [torch.ones(10)] + [torch.zeros(10)] * 200:
        parameter.grad = gradient
        optimizer.step()
    assert not optimizer.state[parameter]["exp_avg"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    plain = nn.Parameter(random_values(600, 1).view(20, 30))
    others = [nn.Parameter(plain.detach().to(dtype)), nn.Parameter(plain.detach().t().clone().t())]
    for parameter in (plain, *others):
        optimizer = LagAdamW([parameter], lr=0.1)
        optimizer.mark_sparse([parameter])
        for seed in range(5):
            gradient = random_values(600, seed) * (torch.arange(600) % 5 == seed)
            parameter.grad = gradient.view(20, 30).to(parameter.dtype)
            optimizer.step()
    assert torch.equal(others[1], plain)
    torch.testing.assert_close(others[0].float(), plain, rtol=2e-2, atol=2e-2)


def trained(marked: bool = True, steps: int = 30) -> tuple[nn.Module, LagAdamW]:
    model = a_model()
    optimizer = LagAdamW(model.parameters(), lr=0.01)
    optimizer.mark_sparse([p for p in model.parameters() if p.ndim > 1] if marked else [])
    run_steps(model, optimizer, steps, present=0.2)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    model, optimizer = trained(steps=300)  # a step that bfloat16 does not hold
    model, optimizer = (model.to(dtype), optimizer) if dtype == torch.float32 else _in_bfloat16()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = deepcopy(model)
    resumed = LagAdamW(other.parameters(), lr=0.5)
    resumed.mark_sparse([p for p in other.parameters() if p.ndim > 1])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for trained_model, its_optimizer in ((model, optimizer), (other, resumed)):
        run_steps(trained_model, its_optimizer, 10, seed=5, present=0.2)
    assert same(model, other)


def _in_bfloat16() -> tuple[nn.Module, LagAdamW]:
    model = a_model().bfloat16()
    optimizer = LagAdamW(model.parameters(), lr=0.01)
    optimizer.mark_sparse([p for p in model.parameters() if p.ndim > 1])
    run_steps(model, optimizer, 300, present=0.2)
    return model, optimizer


def test_a_copy_goes_on_to_the_bit() -> None:
    originals = trained()
    copies = deepcopy(originals)
    for model, optimizer in (originals, copies):
        run_steps(model, optimizer, 5, seed=1, present=0.2)
    assert same(originals[0], copies[0])


@pytest.mark.parametrize("marked", [False, True])
def test_adamw_state_is_taken_over(marked: bool) -> None:
    model = a_model()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    run_steps(model, theirs, 400)
    other = deepcopy(model)
    ours = LagAdamW(other.parameters())
    ours.mark_sparse(other.parameters() if marked else [])
    ours.load_state_dict(deepcopy(theirs.state_dict()))  # otherwise both write to the same tensors
    assert ours.param_groups[0]["lr"] == 0.01
    before = deepcopy(model)
    for trained_model, optimizer in ((model, theirs), (other, ours)):
        run_steps(trained_model, optimizer, 1, seed=1)
    if not marked:
        assert same(model, other)
    for old, a, b in zip(before.parameters(), model.parameters(), other.parameters(), strict=True):
        moved = float((a - old).detach().norm())
        assert float((a - b).detach().norm()) < 0.02 * moved


def test_a_parameter_that_is_marked_no_longer_goes_on_as_adamw() -> None:
    model, optimizer = trained()
    steps = {name: deepcopy(optimizer.state[p]) for name, p in model.named_parameters() if p.ndim > 1}
    optimizer.mark_sparse([])
    run_steps(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert "last_step" not in state
        if name in steps:
            assert state["step"] == steps[name]["step"] + 1


def test_parameters_without_gradients_are_left_alone() -> None:
    model, optimizer = trained()
    states, before = deepcopy(optimizer.state_dict()), deepcopy(model)
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3.5) == 3.5
    assert same(model, before)
    assert str(optimizer.state_dict()) == str(states)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable", "fused"])
def test_arguments_that_are_refused(name: str) -> None:
    parameters = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match=f"does not take {name}=True"):
        LagAdamW(parameters, **{name: True})
    with pytest.raises(ValueError, match=f"does not take {name}=True"):
        LagAdamW([{"params": parameters, name: True}])


def test_a_state_with_amsgrad_is_refused_and_changes_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    theirs, ours = torch.optim.AdamW([parameter], amsgrad=True), LagAdamW([parameter], lr=0.5)
    with pytest.raises(ValueError, match="does not take amsgrad=True"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5 and not ours.param_groups[0]["amsgrad"]


def test_a_hook_may_load_another_state() -> None:
    """As torch's documentation maps states to parameters by their names."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    saved, loaded = LagAdamW(parameters), LagAdamW(parameters[::-1])
    for optimizer in (saved, loaded):
        optimizer.mark_sparse(parameters)
    for step in range(3):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full((4,), float(number or not step))
        saved.step()
    loaded.register_load_state_dict_pre_hook(
        lambda _, given: {**given, "state": {0: given["state"][1], 1: given["state"][0]}}
    )
    loaded.load_state_dict(deepcopy(saved.state_dict()))
    assert [loaded.state[p]["last_step"].tolist() for p in parameters] == [[1] * 4, [3] * 4]


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_parameters_are_pairs_of_real_ones(foreach: bool) -> None:
    start = torch.randn(5, dtype=torch.complex64, generator=draws())
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = LagAdamW([ours], lr=0.1, foreach=foreach), torch.optim.AdamW([theirs], lr=0.1, foreach=foreach)
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.randn(5, dtype=torch.complex64, generator=draws(step))
            optimizer.step()
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="got a complex one"):
        optimizers[0].mark_sparse([ours])


def test_unknown_parameters_and_sparse_gradients_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = LagAdamW([parameter])
    with pytest.raises(ValueError, match="1 of 2 parameters that LagAdamW does not hold"):
        optimizer.mark_sparse([parameter, nn.Parameter(torch.zeros(3))])
    for marked in ([], [parameter]):
        optimizer.mark_sparse(marked)
        parameter.grad = torch.zeros(3).to_sparse()
        with pytest.raises(RuntimeError, match="strided gradients"):
            optimizer.step()


def test_hooks_run_once_a_step() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(3))])  # gives torch's step its hooks
    _, optimizer = trained()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
