"""Models that stay in DDP: its communication hook exchanges as DistributedOptimizer does on a plain model."""

from __future__ import annotations

import pytest
import torch

from tests.support.worlds import register

pytestmark = pytest.mark.multiprocess

TARGETS = "tests.support.ddp_targets"
TRAINS = {ranks: register("torch", ranks, f"{TARGETS}:trains_as_a_plain_model") for ranks in (2, 3)}
ACCUMULATES = register("torch", 2, f"{TARGETS}:accumulates")
SKIPS = register("torch", 2, f"{TARGETS}:skips")
GOES_ON = register("torch", 2, f"{TARGETS}:goes_on_from_its_state")
SCALER = register("torch", 2, f"{TARGETS}:with_a_scaler")
JOINS = register("torch", 2, f"{TARGETS}:joins")
WARNED = register("torch", 2, f"{TARGETS}:warned")
REFUSED = register("torch", 2, f"{TARGETS}:refused")


@pytest.mark.parametrize("ranks", TRAINS)
def test_trains_as_a_plain_model_does(ranks: int) -> None:
    results = TRAINS[ranks].results()
    for case in results[0]:
        for hook, plain in (result[case] for result in results):
            assert torch.equal(hook, results[0][case][0]), f"{case}: ranks hold equal bits"
            torch.testing.assert_close(hook, plain, rtol=1e-5, atol=1e-6, msg=case)


def test_passes_under_no_sync_go_along_with_the_next_one() -> None:
    for hook, plain in ACCUMULATES.results():
        torch.testing.assert_close(hook, plain, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks() -> None:
    for result in SKIPS.results():
        assert (result["moved"], result["is nan"], result["skipped"]) == (False, True, 3)
        assert result["said"].startswith("RuntimeError: all ranks skipped 3 steps in a row"), "raised by backward()"


def test_goes_on_from_its_state_to_the_bit() -> None:
    for whole, resumed in GOES_ON.results():
        assert torch.equal(whole, resumed)


def test_residuals_do_not_carry_the_loss_scale() -> None:
    for result in SCALER.results():
        assert torch.equal(result["scaled"], result["plain"])
        assert len(set(result["scales"])) > 2, "the scale must change"
        assert "call scaler.unscale_(optimizer) before scaler.step(optimizer)" in result["said"]


def test_a_rank_without_data_is_stood_in_for_by_ddps_join() -> None:
    results = JOINS.results()
    for result in results:
        assert torch.equal(result["hook"], results[0]["hook"])
        torch.testing.assert_close(result["hook"], result["plain"], rtol=1e-5, atol=1e-6)


def test_gradients_that_were_averaged_before_or_in_vain_are_told_once() -> None:
    first, second = WARNED.results()
    for case in ("averaged before", "equal data"):
        assert first[case].startswith("in step 0 the gradients of 2 ranks are equal before they are averaged")
        assert first[case].count("are equal") == 1
    for case in ("in vain", "cleared by the model", "filled with zeros"):
        assert first[case].startswith("zero_grad() throws gradients away") and first[case].count("throws") == 1
    assert [first[case] for case in ("hook", "skipped", "only weight decay", "added up")] == [""] * 4
    assert set(second.values()) == {""}


def test_models_that_do_not_fit_are_refused_on_every_rank() -> None:
    for rank, said in enumerate(REFUSED.results()):
        assert said["plain"].startswith("ValueError: model must be a DistributedDataParallel, got Branching: a plain")
        assert "module.branches.0.weight" in said["part"] and "must have the same parameters" in said["part"]
        assert said["sparse"].startswith("ValueError: module.0 has sparse gradients")
        assert f"exchanges as rank {rank} of 2, and the model's DDP is rank 0 of 1" in said["group"]
        assert "got Branching" in said["one rank"]
        assert "has a hook already, and takes one only: after wrapping another optimizer make a new" in said["again"]
        assert "use the model's own, 'with model.join():'" in said["join"]
        assert "optimizer must be a DistributedOptimizer, got LocalSteps" in said["rounds"]
