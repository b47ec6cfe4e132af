"""Gloo's thread of our groups waits for a core; those of other groups stay as they are."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from hvd_sketch.transport.gloo_threads import NICER, NICEST, _loops
from hvd_sketch.transport.torch_groups import connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux names threads")
TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_the_thread_of_a_group_of_ours_is_nicer_than_its_rank(host: str | None) -> None:
    others = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, TIMEOUT)
    before = _loops()
    channel = connect(dist.HashStore(), 0, 1, TIMEOUT, with_nccl=False, host=host)
    (ours,) = _loops() - before
    own_nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.sched_getscheduler(ours) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, ours) == min(own_nice + NICER, NICEST)
    assert before and all(os.sched_getscheduler(other) == os.SCHED_OTHER for other in before)
    assert channel.size == others.size() == 1
