"""``hvd.DistributedOptimizer`` becomes ``hvd_sketch.DistributedOptimizer``: what a Horovod script relies on holds."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hvd_sketch.transport.stall import STALL_VARIABLE
from tests.support.harness import launch
from tests.support.worlds import register

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not installed: launch/setup.sh builds it"),
]


CHECKS = register("horovod-gloo", 2, "tests.support.dropin:check_all")


@pytest.mark.slow
def test_all_checks_under_horovodrun() -> None:
    ran = CHECKS.results()
    assert ran[0] == ran[1] > 10, "so many checks"


@pytest.mark.daily
def test_a_rank_outside_of_the_process_set_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    first, outside, last = launch("horovod-gloo", 3, "tests.support.dropin:process_sets", timeout_s=180)
    for way in ("dense", "sketched"):
        for name, parameter in first[way].items():
            assert torch.equal(parameter, last[way][name]), (way, name)
            assert torch.equal(outside[way][name], outside["alone"][name]), (way, name)
            assert not torch.equal(parameter, first["alone"][name]), (way, name)
    for name, parameter in first["dense"].items():
        assert torch.equal(parameter, first["horovod"][name]), name


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.daily
def test_horovods_join_ends_the_job_and_names_ours(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    monkeypatch.setenv(STALL_VARIABLE, "3")  # so that ranks that wait look soon at what the others do
    told = r"(?s)ended with status [1-9].*rank 0 of 2 left this step.*hvd.join\(\).*with optimizer.join\(\)"
    target = "tests.support.dropin:leave_by_horovods_join"
    with pytest.raises(AssertionError, match=told):
        launch("horovod-gloo", 2, target, timeout_s=120, candidates="nominate", levels=levels)
