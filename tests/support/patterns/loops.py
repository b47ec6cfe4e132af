"""Training loops and optimizers of other kinds than the plain one, and how they end, overflow and resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_sketch import (
    DistributedOptimizer,
    SketchConfig,
    SketchedAllreduce,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvd_sketch.transport import Transport
from tests.support.patterns.training import assert_equal_everywhere, loss, network, saved_and_loaded, sketches, wrap

# --- methods that change parameters


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation by two steps of its own."""

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["e"] = 0.05 * p.grad / p.grad.norm()
            p.add_(self.state[p]["e"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["e"])
        torch.optim.SGD.step(self)
        self.zero_grad()

    def step_by_data(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.1)

    def rate(self) -> float:
        return self.param_groups[0]["lr"]


def check_own_steps_of_an_optimizer_after_synchronize(t: Transport) -> None:
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch, SAM)
        for step in range(3):
            loss(model, t.rank, step).backward()
            assert optimizer.rate() == 0.05  # what only reads may be called at any time
            assert optimizer.synchronize()
            optimizer.first_step()
            loss(model, t.rank, step).backward()
            optimizer.synchronize()
            optimizer.second_step()
        assert optimizer.ledger.totals().steps == 6
        assert_equal_everywhere(t, model)


def check_gradients_assigned_by_hand_are_exchanged(t: Transport) -> None:
    """No hook sees them."""
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch, SAM)
        for step in range(4):
            for by_sam in (True, False):
                gradients = torch.autograd.grad(loss(model, t.rank, step), list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.synchronize()
                optimizer.first_step() if by_sam else optimizer.second_step()
        assert optimizer.ledger.totals().steps == 8
        assert_equal_everywhere(t, model)
        parameter.grad = gradient.clone()  # and without an exchange they are refused, also where torch counts no change
        with pytest.raises(RuntimeError, match=r"step_by_data\(\) changed parameters"):
            optimizer.step_by_data()


def check_own_steps_without_an_exchange_are_refused(t: Transport) -> None:
    model = network()
    optimizer = wrap(t, model, None, SAM)
    loss(model, t.rank, 0).backward()
    with pytest.raises(RuntimeError, match=r"SAM.first_step\(\) changed parameters .*synchronize\(\)"):
        optimizer.first_step()


# --- other set-ups


def check_a_layer_used_three_times_under_reentrant_checkpointing(t: Transport) -> None:
    for sketch in sketches():
        layer = nn.Linear(64, 64)
        broadcast_parameters(layer.state_dict(), 0, t)
        optimizer = wrap(t, layer, sketch)
        x = torch.randn(8, 64, requires_grad=True)
        for _ in range(3):
            x = checkpoint(layer, x, use_reentrant=True)
        x.square().mean().backward()
        optimizer.step()
        assert_equal_everywhere(t, layer)


def check_dense_keeps_float64(t: Transport) -> None:
    model = network(torch.float64)
    optimizer = wrap(t, model, None)
    for scale in (1.0, 1e-50, 1e200):
        optimizer.zero_grad()
        (loss(model, 0, 0, torch.float64) * scale).backward()  # the same on all ranks: the mean is the gradient itself
        plain = model[0].weight.grad.clone()
        optimizer.synchronize()
        torch.testing.assert_close(model[0].weight.grad, plain, rtol=1e-14, atol=0.0)


# --- overflow


def check_training_goes_on_after_an_overflow(t: Transport) -> None:
    for options in ({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.0, "candidates": "heavymix"}):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=100, k=10, **options), 1000, t)
        generator = torch.Generator().manual_seed(t.rank)
        for step in range(40):
            gradient = torch.randn(1000, generator=generator)
            if step == 5:
                gradient[123] = 3e38
            update = exchange.step(gradient)
            assert not update.skipped and bool(torch.isfinite(update.values).all())
        assert bool(torch.isfinite(exchange.residual).all()) and float(exchange.residual.abs().max()) < 1e6


# --- ranks that run out of data


def check_nobody_has_a_batch_after_rank_0_loaded(t: Transport) -> None:
    """The dense exchange beside the sketched takes over the state as well."""
    sketch = SketchConfig.paper(cols=200, k=40, momentum=0.9, dense_below=100)
    model = network()
    optimizer = wrap(t, model, sketch)
    loss(model, t.rank, 0).backward()
    optimizer.step()
    saved = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict(consolidated=True)})
    optimizer = wrap(t, model, sketch)
    if t.rank == 0:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    with optimizer.join():
        pass
    for step in range(2):
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.step()
    assert_equal_everywhere(t, model)


def check_ranks_with_different_numbers_of_batches(t: Transport) -> None:
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch, check_every=1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for epoch in range(2):
            with optimizer.join():
                for step in range(2 + 2 * t.rank):
                    optimizer.zero_grad()
                    loss(model, t.rank, 10 * epoch + step).backward()
                    optimizer.step()
            scheduler.step()
            assert_equal_everywhere(t, model)
        assert optimizer.ledger.totals().steps == 2 * (2 + 2 * (t.size - 1))


# --- resuming


def check_rank_0_loads_and_broadcasts(t: Transport) -> None:
    for sketch in sketches():
        for consolidated in (True, False):
            model = network()
            optimizer = wrap(t, model, sketch, torch.optim.AdamW)
            for step in range(3):
                optimizer.zero_grad()
                loss(model, t.rank, step).backward()
                optimizer.step()
            state = optimizer.state_dict(consolidated=consolidated)
            saved = saved_and_loaded({"model": model.state_dict(), "optimizer": state})
            resumed = [resume(t, sketch, saved, everywhere) for everywhere in (False, True)]
            assert_equal_everywhere(t, resumed[0][0])
            if consolidated:  # everything is in rank 0's checkpoint: the ranks go on as if each had loaded it
                assert all(map(torch.equal, resumed[0][0].parameters(), resumed[1][0].parameters()))
                residuals = [optimizer.exchange.residual if optimizer.exchange else None for _, optimizer in resumed]
                assert residuals[0] is None or torch.equal(*residuals)


def resume(
    t: Transport, sketch: SketchConfig | None, saved: dict[str, Any], everywhere: bool
) -> tuple[nn.Module, DistributedOptimizer]:
    """Two steps from a checkpoint that all ranks load, or rank 0 alone."""
    model = network()
    optimizer = wrap(t, model, sketch, torch.optim.AdamW)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does in prepare()
    if everywhere or t.rank == 0:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    if not everywhere:
        broadcast_parameters(model.state_dict(), 0, t)
        broadcast_optimizer_state(optimizer, 0, t)
    for step in (3, 4):
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.step()
    return model, optimizer
