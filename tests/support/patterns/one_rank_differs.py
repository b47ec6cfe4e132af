"""One rank does what the others do not: all agree on what follows, or all are told."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

from hvd_sketch import DistributedOptimizer, LocalSteps
from hvd_sketch.transport import Transport
from tests.support.patterns.training import assert_equal_everywhere, loss, network, sketches, wrap

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
        optimizer.step()
    if t.rank == 0:
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match=r"(?s)parameters differ.*step 5.*'0\.weight': checksum .* on rank 0; "):
        optimizer.step()


def check_schedules_that_drift_apart_are_refused_before_the_step(t: Transport) -> None:
    """One rank alone lowers its rate, as ReduceLROnPlateau does after a metric of its own."""
    for sketch in sketches():
        for name, value, own in (("lr", 0.05, 0.025), ("momentum", 0.0, 0.9), ("lr", torch.tensor(0.5), 0.25)):
            model = network()
            optimizer = wrap(t, model, sketch)
            optimizer.param_groups[0][name] = value
            for step in range(5):
                optimizer.zero_grad()
                loss(model, t.rank, step).backward()
                if step == 4 and t.rank == t.size - 1:
                    optimizer.param_groups[0][name] = own
                if step < 4:
                    optimizer.step()
            differ = rf"{name} of group 0: {float(value)} on rank.*; {own} on"
            with pytest.raises(RuntimeError, match=rf"(?s)between the ranks .*{differ}"):
                optimizer.step()
            assert_equal_everywhere(t, model)


class StandingStill(torch.optim.SGD):
    """Whatever its settings are."""

    def step(self, closure: object = None) -> None: ...


def check_settings_of_any_kind_are_compared(t: Transport) -> None:
    """Those that are no numbers are left out; models that never were equal go on, as before."""
    model = network()
    optimizer = wrap(t, model, None, StandingStill)
    optimizer.param_groups[0] |= {"betas": torch.tensor([0.9, 0.99]), "weight_decay": None, "momentum": "0.5"}
    for _ in range(4):
        optimizer.step()
    with torch.no_grad():
        model[0].weight += t.rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = wrap(t, model, None)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t.rank)
        for _ in range(4):
            optimizer.step()


def check_schedules_with_two_levels_and_rounds_are_compared(t: Transport) -> None:
    if t.size == 1:
        return
    for make in (
        lambda model: wrap(t, model, None, levels=2),
        lambda model: LocalSteps(torch.optim.SGD(model.parameters(), lr=0.1), None, None, t, every=1),
    ):
        model = network()
        optimizer = make(model)
        for step in range(4):
            optimizer.zero_grad()
            loss(model, t.rank, step).backward()
            if step < 3:
                optimizer.step()
        groups = getattr(optimizer, "outer", optimizer).param_groups
        groups[0]["lr"] = 0.1 + t.rank
        with pytest.raises(RuntimeError, match="the optimizers' settings, or their steps, differ between the ranks"):
            optimizer.step()


def check_a_step_that_one_rank_leaves_out_is_told_in_the_next(t: Transport) -> None:
    """An error after averaging that a script catches, to go on with the next batch."""
    if t.size == 1:
        return
    for fails_inside in (False, True):
        model = network()
        optimizer = wrap(t, model, None, FailingOnce if fails_inside else torch.optim.SGD)
        for step in range(4):
            optimizer.zero_grad()
            loss(model, t.rank, step).backward()
            if step < 3:
                optimizer.synchronize()
            if step == 2 and t.rank == 0 and not fails_inside:
                continue
            if step < 3:
                optimizer.inner.is_due = step == 2 and t.rank == 0
                with optimizer.skip_synchronize(), suppress(MemoryError):
                    optimizer.step()
        with pytest.raises(RuntimeError, match="averaged: not made on rank 0; made on") as caught:
            optimizer.synchronize()
        assert "settings, or their steps, differ" in str(caught.value)


class FailingOnce(torch.optim.SGD):
    def step(self, closure=None):
        if self.is_due:
            raise MemoryError
        return super().step(closure)


def check_steps_that_all_ranks_leave_out_are_no_error(t: Transport) -> None:
    """Also where one rank then evaluates with averaged weights, as a schedule-free optimizer does."""
    model = network()
    optimizer = wrap(t, model, None, Averaging)
    for step in range(6):
        optimizer.zero_grad()
        loss(model, t.rank, step).backward()
        optimizer.synchronize()
        if step == 3:
            optimizer.zero_grad()
            if t.rank == 0:
                optimizer.look()
            continue
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_equal_everywhere(t, model)


class Averaging(torch.optim.SGD):
    @torch.no_grad()
    def look(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            kept = parameter.clone()
            parameter.zero_()
            parameter.copy_(kept)


def check_ranks_that_have_left_compare_no_schedules(t: Transport) -> None:
    """A scheduler of every batch is behind on ranks that have run out of data."""
    model = network()
    optimizer = wrap(t, model, None)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with optimizer.join():
        for step in range(3 + 2 * t.rank):
            optimizer.zero_grad()
            loss(model, t.rank, step).backward()
            optimizer.step()
            scheduler.step()
    assert_equal_everywhere(t, model)


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
            with pytest.raises(RuntimeError, match=r"different kinds .*consolidated on rank 0; own"):
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
