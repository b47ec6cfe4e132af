"""Gradients that are not finite: all ranks skip, also with a gradient scaler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, RANKS, Toy, alone, assert_all_equal, everything, integers, little, mean_of, wrap

pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("bad", ["weight", "bias"])
@pytest.mark.parametrize("config", [little(momentum=0.5), None])
def test_one_bad_rank_makes_all_skip(config: SketchConfig | None, bad: str, early: bool, ranks: int) -> None:
    """Parameters, u and v stay as they were, p.grad is NaN everywhere, and the next step goes on.

    With ``early`` by synchronize().
    """

    def rank_main(transport: LocalTransport) -> tuple[int, list[Tensor]]:
        model = Toy()
        optimizer = wrap(transport, model, config)
        for step in range(3):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            if step == 1 and transport.rank == ranks - 1:
                getattr(model, bad).grad.view(-1)[2] = float("inf")
            before = [
                optimizer.state_dict()["hvd_sketch"],
                [p.detach().clone() for p in model.parameters()],
            ]
            if early:
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
            saved = optimizer.state_dict()["hvd_sketch"]
            unchanged = [
                all(torch.equal(p, q) for p, q in zip(before[1], model.parameters(), strict=True)),
                all(bool(gradient.isnan().all()) for gradient in model.gradients()),
                all(torch.equal(saved[way][part], before[0][way][part])
                    for way in ("sketched", "dense") if saved[way] for part in ("u", "v") if part in saved[way]),
            ]  # fmt: skip
            assert all(unchanged) == (step == 1) and unchanged[0] == (step == 1), (step, unchanged)
        return optimizer.skipped_steps, [p.detach() for p in model.parameters()]

    results = run_local(ranks, rank_main, LIMIT_S)
    for skipped, parameters in results:
        assert skipped == 1
        assert_all_equal(parameters, results[0][1])


def amp_scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("order", ["step", "unscale", "synchronize"])
@pytest.mark.parametrize("config", [everything(60), None])
def test_grad_scaler_with_inf_on_one_rank(config: SketchConfig | None, order: str, ranks: int) -> None:
    """Every rank has a scale of its own; Inf on the last rank in step 1 makes all skip, and nobody waits."""

    def rank_main(transport: LocalTransport) -> tuple[list[Tensor], int, float]:
        model = Toy()
        optimizer = wrap(transport, model, config)
        scaler = amp_scaler(2.0 ** (transport.rank + 3))
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            bad = step == 1 and transport.rank == ranks - 1
            model.backward(transport.rank, step, factor=float("inf") if bad else float(scaler.scale(torch.ones(()))))
            if order != "step":
                scaler.unscale_(optimizer)
            if order == "synchronize":
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            seen.append([-p.detach() for p in model.parameters()])
            seen[-1] = [p.clone() for p in seen[-1]]
        assert_all_equal(seen[0], seen[1])
        return seen[2], optimizer.skipped_steps, scaler.get_scale()

    for rank, (moved, skipped, scale) in enumerate(run_local(ranks, rank_main, LIMIT_S)):
        assert_all_equal(moved, [a + b for a, b in zip(mean_of(ranks, 0), mean_of(ranks, 2), strict=True)])
        assert skipped == 1
        assert scale == 2.0 ** (rank + 3) / (2 if rank == ranks - 1 else 1)


def test_what_the_scaler_found_makes_all_skip_even_when_mended_since() -> None:
    def rank_main(transport: LocalTransport) -> tuple[int, bool]:
        model, scaler = Toy(), amp_scaler(8.0)
        optimizer = wrap(transport, model, everything(60))
        scaler.scale(torch.ones(()))
        model.backward(transport.rank, 0, factor=float("inf") if transport.rank else 1.0)
        scaler.unscale_(optimizer)
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        scaler.step(optimizer)
        return optimizer.skipped_steps, bool(model.weight.any())

    assert run_local(2, rank_main, LIMIT_S) == [(1, False)] * 2


def test_grad_scaler_must_unscale_before_synchronize() -> None:
    model, scaler = Toy(), amp_scaler(8.0)
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0, factor=float(scaler.scale(torch.ones(()))))
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)


def test_a_disabled_grad_scaler_changes_nothing() -> None:
    model, scaler = Toy(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0)
    scaler.step(optimizer)
    scaler.update()
    assert_all_equal(model.gradients(), integers(0, 0))


def test_the_scale_is_undone_in_float32_before_momentum() -> None:
    """2**-30 is zero in float16, and u must not remember the scale of its step."""
    model = Toy(torch.float16)
    optimizer = wrap(alone(), model, little(momentum=0.5))
    for scale in (2.0**30, 2.0**28):
        scaler = amp_scaler(scale)
        scaler.scale(torch.ones(()))
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale * 2.0**-30)
        scaler.step(optimizer)
    u = optimizer.exchange.velocity
    assert set(u.tolist()) == {0.0, 2.0**-30, 1.5 * 2.0**-30}  # sent now, sent before, never sent


@pytest.mark.filterwarnings("default")
def test_the_warning_of_a_skipped_step_is_of_the_users_line() -> None:
    model = Toy()
    optimizer = wrap(alone(), model, little())
    model.backward(0, 0, float("nan"))
    with pytest.warns(RuntimeWarning, match="all ranks skip this step") as warned:
        optimizer.step()
    assert warned[0].filename == __file__
