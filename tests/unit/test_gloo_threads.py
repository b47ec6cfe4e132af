"""Gloo's thread of our groups waits for a core; those of other groups stay as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from hvd_sketch.transport.gloo_threads import NICER, NICEST, _loops
from hvd_sketch.transport.torch_groups import connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux names threads")
TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_the_threads_of_a_group_of_ours_are_nicer_than_its_ranks(host: str | None) -> None:
    others = together(lambda store, rank: dist.ProcessGroupGloo(store, rank, 2, TIMEOUT))
    before = _loops()
    ours = together(lambda store, rank: connect(store, rank, 2, TIMEOUT, with_nccl=False, host=host))
    new = _loops() - before
    expected = min(os.getpriority(os.PRIO_PROCESS, 0) + NICER, NICEST)
    assert len(new) == 2 and before
    assert {os.sched_getscheduler(thread) for thread in new} == {os.SCHED_BATCH}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in new} == {expected}
    assert others[0].size() == ours[0].size == 2


def together(connect_rank: Callable[[Any, int], Any]) -> list[Any]:
    """What each of two ranks, threads of this process, gets; a group's thread has its name once both are connected."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: connect_rank(store, rank), range(2)))
