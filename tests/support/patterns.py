"""What users' training scripts do, run by test_patterns.py on every transport: no rank may drift from the others.

Every ``check_*`` is one pattern; after each all ranks hold equal bits.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_sketch import (
    DistributedOptimizer,
    SketchConfig,
    SketchedAllreduce,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from hvd_sketch.transport import Transport


def check_all(transport: Transport) -> int:
    """Run every check; returns how many ran."""
    warnings.filterwarnings("ignore", message="all ranks skip this step|rank . is beyond")
    checks = [value for name, value in globals().items() if name.startswith("check_") and name != "check_all"]
    for check in checks:
        check(transport)
        transport.barrier()
    return len(checks)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same on every rank."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def sketches() -> Iterator[SketchConfig | None]:
    """Dense, sketched, sketched with momentum."""
    yield None
    for momentum in (0.0, 0.9):
        yield SketchConfig(cols=200, k=40, momentum=momentum, dense_below=100)


def wrap(
    transport: Transport,
    model: nn.Module,
    sketch: SketchConfig | None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> DistributedOptimizer:
    return DistributedOptimizer(
        make(model.parameters(), lr=0.05), model.named_parameters(), sketch, transport, **options
    )


def loss(model: nn.Module, rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return model(torch.randn(8, 32, generator=generator).to(dtype)).square().mean()


def assert_equal_everywhere(transport: Transport, model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = transport.allgather(flat.unsqueeze(0))
    assert bool(torch.isfinite(every).all())
    assert torch.equal(every, every[:1].expand_as(every)), (every - every[0]).abs().max()


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- a rank's own state leaks into what all share


def check_horovods_order_with_a_gradient_scaler(t: Transport) -> None:
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for step in range(8):
            optimizer.zero_grad()
            factor = float("inf") if step == 2 and t.rank == t.size - 1 else 1.0
            scaler.scale(loss(model, t.rank, step) * factor).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        scales = t.allgather(torch.tensor([scaler.get_scale()]))
        assert len(set(scales.tolist())) == 1 and scaler.get_scale() < 2048 and optimizer.skipped_steps == 1
        assert_equal_everywhere(t, model)


def check_what_one_scaler_found_before_synchronize_decides_nothing(t: Transport) -> None:
    """The last rank's scaler sees Inf, the user mends the gradient: all ranks step."""
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = wrap(t, model, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss(model, t.rank, 0)).backward()
    if t.rank == t.size - 1:
        model[0].weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    model[0].weight.grad.nan_to_num_(posinf=0.0)
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)
    assert_equal_everywhere(t, model)


def check_frozen_on_one_rank(t: Transport) -> None:
    for sketch in sketches():
        for frozen_by in (0, t.size - 1):
            model = network()
            optimizer = wrap(t, model, sketch)
            for step in range(4):
                if step == 1 and t.rank == frozen_by:
                    model[0].weight.requires_grad_(False)
                optimizer.zero_grad()
                loss(model, t.rank, step).backward()
                optimizer.step()
            assert_equal_everywhere(t, model)


def check_frozen_on_all_ranks_stays_as_it_is(t: Transport) -> None:
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch, torch.optim.AdamW)
        for step in range(4):
            if step == 2:
                model[0].weight.requires_grad_(False)
                frozen = model[0].weight.detach().clone()
                kept = optimizer.exchange.residual[:2048].clone() if optimizer.exchange is not None else None
            optimizer.zero_grad()
            loss(model, t.rank, step).backward()
            optimizer.step()
        assert torch.equal(model[0].weight, frozen)
        assert kept is None or (bool(kept.any()) and torch.equal(optimizer.exchange.residual[:2048], kept))
        assert_equal_everywhere(t, model)


def check_a_rank_that_changed_its_dtype_stops_all(t: Transport) -> None:
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch)
        if t.rank == t.size - 1:
            model[2].weight.data = model[2].weight.data.double()
        own = t.rank == t.size - 1
        with pytest.raises(ValueError if own else RuntimeError, match=r"'2\.weight' was float32 .*is float64"):
            optimizer.step()


def check_a_parameter_that_came_later_on_one_rank_stops_all(t: Transport) -> None:
    model = network()
    model[2].bias.requires_grad_(False)
    optimizer = wrap(t, model, None)
    if t.rank == 0:
        model[2].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="began to require a gradient"):
        optimizer.step()


def check_drift_of_any_cause_is_refused(t: Transport) -> None:
    model = network()
    optimizer = wrap(t, model, None, check_every=5)
    for step in range(5):  # the first comparison, after the first step, finds nothing
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.param_groups[0]["lr"] = 0.05 if step < 4 or t.rank else 0.06  # in the last step
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"(?s)parameters differ.*step 5.*'0\.weight': checksum .* on rank 0; "):
        optimizer.step()


def check_a_forgotten_broadcast_is_told_once(t: Transport) -> None:
    """Every rank goes on with a model of its own, as under Horovod, where nobody would say so."""
    model = network()
    if t.rank == t.size - 1:
        with torch.no_grad():
            model[2].bias[3] += 1e-6
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hvd_sketch.model.gradients")
    for settings in ({"check_every": 0}, {"check_every": 2}):
        optimizer = wrap(t, model, None, **settings)
        if t.rank == 0:
            logger.addHandler(listener)
        for _ in range(5):
            optimizer.step()
        logger.removeHandler(listener)
        assert len(told) == (t.rank == 0 and settings["check_every"] > 0)
    for text in told:
        assert "before step 0" in text and "'2.bias': checksum" in text and "'2.weight'" not in text
        assert "call broadcast_parameters" in text


# --- whether gradients are averaged already is not for one rank to decide


def check_a_rank_without_a_backward_pass_still_exchanges(t: Transport) -> None:
    """By synchronize() alone, without step(): as SAM, or after a skipped exchange."""
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch)
        for step in range(6):
            model.zero_grad()
            if step % 2 == 0 or t.rank != 0:
                factor = float("nan") if step == 2 else 1.0
                (loss(model, t.rank, step) * factor).backward()
            if not optimizer.synchronize():
                continue
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:  # alone in the job, this rank has none
                        parameter -= 0.05 * parameter.grad
        assert optimizer.ledger.totals().steps == 6 and optimizer.skipped_steps == 1
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


def check_a_rank_that_goes_its_own_way_after_synchronize_stops_all(t: Transport) -> None:
    if t.size == 1:
        return

    def another_backward(model: nn.Module, optimizer: DistributedOptimizer) -> None:
        loss(model, t.rank, 1).backward()

    def clear(model: nn.Module, optimizer: DistributedOptimizer) -> None:
        optimizer.zero_grad()

    for own_way in (another_backward, clear):
        model = network()
        optimizer = wrap(t, model, None)
        loss(model, t.rank, 0).backward()
        optimizer.synchronize()
        if t.rank == t.size - 1:
            own_way(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="gradients that synchronize\\(\\) has averaged, rank"):
                optimizer.step()


def check_different_kinds_of_checkpoints_stop_all(t: Transport) -> None:
    if t.size == 1:
        return
    for sketch in sketches():
        model = network()
        optimizer = wrap(t, model, sketch)
        loss(model, t.rank, 0).backward()
        optimizer.step()
        own, common = optimizer.state_dict(), optimizer.state_dict(consolidated=True)
        if sketch is not None:
            optimizer.load_state_dict(common if t.rank == 0 else own)
            with pytest.raises(RuntimeError, match=r"different kinds of checkpoints.*anyones on rank 0; own on rank"):
                optimizer.step()
        optimizer.load_state_dict(common)
        if t.rank == 0:
            optimizer.load_state_dict({key: own[key] for key in ("state", "param_groups")})
        with pytest.raises(RuntimeError, match=r"different kinds of checkpoints.*plain on rank 0"):
            optimizer.step()


# --- no gradient is not a gradient of zero


def check_parameters_that_nobody_uses_are_left_alone(t: Transport) -> None:
    for sketch in sketches():
        model = nn.ModuleList([network(), network()])
        before = [p.detach().clone() for p in model[1].parameters()]
        optimizer = wrap(t, model, sketch, torch.optim.AdamW)
        for step in range(5):
            optimizer.zero_grad()
            loss(model[0], t.rank, step).backward()
            optimizer.step()
        assert all(map(torch.equal, model[1].parameters(), before))
        assert all(p.grad is None for p in model[1].parameters())
        assert_equal_everywhere(t, model)


def check_what_one_rank_uses_all_update(t: Transport) -> None:
    for sketch in sketches():
        model = nn.ModuleList([network(), network()])
        before = model[1][0].weight.detach().clone()
        optimizer = wrap(t, model, sketch, torch.optim.AdamW)
        for step in range(3):
            optimizer.zero_grad()
            loss(model[1 if t.rank == 0 else 0], t.rank, step).backward()
            optimizer.step()
        assert not torch.equal(model[1][0].weight, before)
        assert_equal_everywhere(t, model)


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
    for options in ({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.0, "selection": "heavymix"}):
        exchange = SketchedAllreduce(SketchConfig(cols=100, k=10, **options), 1000, t)
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
    sketch = SketchConfig(cols=200, k=40, momentum=0.9, dense_below=100)
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
