"""DistributedOptimizer: equal to dense where it must be, a torch optimizer to everything that expects one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from hvd_sketch.config import SketchConfig
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.model.parameters import sketched_dim
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, RANKS, Toy, alone, assert_all_equal, everything, integers, little, mean_of, wrap

pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")


# --- training equals training on the mean gradient


def classifier() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def classify(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    inputs = torch.randn(7, 6, generator=generator)
    return nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))


SCHEDULES: dict[str, tuple[Callable[..., Optimizer], Callable[[Optimizer], Any]]] = {
    "sgd-step": (lambda p: SGD(p, lr=0.5, momentum=0.9), lambda o: lr_scheduler.StepLR(o, 2, 0.3)),
    "adam-onecycle": (lambda p: Adam(p, lr=0.1), lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6)),
    "sgd-onecycle": (
        lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=6, cycle_momentum=True),
    ),
    "adamw-lambda": (
        lambda p: AdamW([{"params": list(p)[:2], "lr": 0.3}, {"params": list(p)[2:]}], lr=0.1),
        lambda o: lr_scheduler.LambdaLR(o, [lambda e: 1 / (e + 1), lambda e: 0.5**e]),
    ),
    "sgd-plateau": (lambda p: SGD(p, lr=0.5), lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1)),
}


def advance(scheduler: Any, step: int) -> None:
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(float(step)) if plateau else scheduler.step()


def train_on_mean_gradient(name: str, ranks: int) -> list[Tensor]:
    """What one process does that sees all batches: the truth, without any of our code."""
    model = classifier()
    make, schedule = SCHEDULES[name]
    optimizer = make(list(model.parameters()))
    scheduler = schedule(optimizer)
    for step in range(5):
        summed: list[Tensor] = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(ranks):
            gradients = torch.autograd.grad(classify(model, rank, step), list(model.parameters()))
            summed = [s + g for s, g in zip(summed, gradients, strict=True)]
        for parameter, total in zip(model.parameters(), summed, strict=True):
            parameter.grad = total / ranks
        optimizer.step()
        advance(scheduler, step)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("sketched", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_equals_training_on_the_mean_gradient(name: str, sketched: bool, ranks: int) -> None:
    def train(transport: LocalTransport) -> list[Tensor]:
        model = classifier()
        make, schedule = SCHEDULES[name]
        config = everything(90) if sketched else None
        inner = make(list(model.parameters()))
        optimizer = DistributedOptimizer(inner, model.named_parameters(), config, transport)
        scheduler = schedule(optimizer)
        for step in range(5):
            optimizer.zero_grad()
            classify(model, transport.rank, step).backward()
            optimizer.step()
            advance(scheduler, step)
        return [p.detach() for p in model.parameters()]

    expected = train_on_mean_gradient(name, ranks)
    assert not torch.equal(expected[0], classifier()[0].weight)
    for trained in run_local(ranks, train, LIMIT_S):
        assert_all_equal(trained, expected)


# --- it is a torch optimizer


def test_param_groups_state_and_defaults_are_the_inner_ones() -> None:
    inner = SGD(Toy().parameters(), lr=1.0, momentum=0.5)
    optimizer = DistributedOptimizer(inner, None, None, alone())
    assert isinstance(optimizer, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
        replacement = copy.copy(getattr(inner, name))
        setattr(optimizer, name, replacement)
        assert getattr(inner, name) is replacement
    inner.load_state_dict(inner.state_dict())  # gives the inner one new objects
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


def test_hooks_run_once_at_the_inner_step() -> None:
    model, calls = Toy(), []
    optimizer = wrap(alone(), model, everything(60))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    model.backward(0, 0)
    optimizer.step()
    assert calls == [("pre", optimizer.inner), ("post", optimizer.inner)]


def test_a_scheduler_attached_before_wrapping_works_without_complaint() -> None:
    model = Toy()
    inner = SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.StepLR(inner, 1, 0.5)
    optimizer = DistributedOptimizer(inner, None, everything(60), alone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            optimizer.zero_grad()
            model.backward(0, step)
            optimizer.step()
            scheduler.step()
    assert torch.equal(model.bias.detach(), -(integers(0, 0)[1] + integers(0, 1)[1] / 2))
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("ranks", [1, 3])
def test_closure_is_evaluated_once_with_gradients_before_the_exchange(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> tuple[list[bool], Any, list[Tensor]]:
        model, grad_enabled = Toy(), []
        optimizer = wrap(transport, model, everything(60))

        def closure() -> str:
            grad_enabled.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            model.backward(transport.rank, 0)
            return "loss"

        with torch.no_grad():
            loss = optimizer.step(closure)
        return grad_enabled, loss, model.gradients()

    for grad_enabled, loss, gradients in run_local(ranks, rank_main, LIMIT_S):
        assert (grad_enabled, loss) == ([True], "loss")
        assert_all_equal(gradients, mean_of(ranks, 0))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("config", [everything(60), None])
def test_zero_grad_both_ways(set_to_none: bool, config: SketchConfig | None) -> None:
    model = Toy()
    optimizer = wrap(alone(), model, config)
    for step in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        if step:
            assert all((p.grad is None) == set_to_none for p in model.parameters())
        model.backward(0, step)
        optimizer.step()
        assert_all_equal(model.gradients(), integers(0, step))


def test_refuses_to_be_copied_and_says_what_it_is() -> None:
    optimizer = wrap(alone(), Toy(), little())
    assert "rank 0 of 1, 60 coordinates sketched, 3 coordinates dense" in repr(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


# --- which coordinates go which way


def test_sketched_dim_counts_what_is_sketched() -> None:
    model = Toy()
    assert sketched_dim(model.parameters(), dense_below=8) == 60
    assert sketched_dim(model.named_parameters(), dense_below=21) == 40
    assert sketched_dim(model.parameters()) == 0
    assert wrap(alone(), model, everything(40, dense_below=21)).exchange.dim == 40
    model.weight.requires_grad_(False)
    assert sketched_dim(model.parameters(), dense_below=8) == 20


def test_all_dense_when_every_tensor_is_small(caplog: pytest.LogCaptureFixture) -> None:
    def rank_main(transport: LocalTransport) -> list[Tensor]:
        model = Toy()
        optimizer = wrap(transport, model, little(dense_below=1000))
        assert optimizer.exchange is None
        model.backward(transport.rank, 0)
        optimizer.step()
        return model.gradients()

    for gradients in run_local(2, rank_main, LIMIT_S):
        assert_all_equal(gradients, mean_of(2, 0))
    assert len(caplog.messages) == 1 and "Lower dense_below" in caplog.text


@pytest.mark.parametrize("ranks", RANKS)
def test_dense_tensors_get_the_same_momentum_beside_sketched_ones(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> tuple[list[Tensor], Any]:
        model = Toy()
        optimizer = wrap(transport, model, little(momentum=0.5))
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            optimizer.step()
            seen.append(model.bias.grad.clone())
        return seen, optimizer.ledger

    for seen, ledger in run_local(ranks, rank_main, LIMIT_S):
        u = torch.zeros(3)
        for step, gradient in enumerate(seen):
            u = 0.5 * u + mean_of(ranks, step)[1]
            torch.testing.assert_close(gradient, u, rtol=1e-6, atol=0)
        assert ledger.totals().steps == 3
        assert "sketch" in {record.phase for record in ledger.records}


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_is_lost_also_across_a_skipped_step(ranks: int) -> None:
    """Over all steps: ranks * sent + residuals = produced, in whole numbers; the skipped step counts for nothing."""

    def rank_main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model, sent = Toy(), torch.zeros(60)
        optimizer = wrap(transport, model, little())
        for step in range(6):
            optimizer.zero_grad()
            model.backward(transport.rank, step, factor=float("nan") if (transport.rank, step) == (0, 2) else 1.0)
            optimizer.step()
            if step != 2:
                sent += torch.cat([model.weight.grad.flatten(), model.other.grad.flatten()]).mul(ranks).round()
        return sent, optimizer.exchange.residual

    results = run_local(ranks, rank_main, LIMIT_S)
    produced = torch.zeros(60)
    for step in (0, 1, 3, 4, 5):
        for rank in range(ranks):
            weight, _, other = integers(rank, step)
            produced += torch.cat([weight.flatten(), other.flatten()])
    kept = sum(residual for _, residual in results)
    for sent, _ in results:
        assert torch.equal(sent + kept, produced)
        assert bool(sent.any()) and bool(kept.any())
