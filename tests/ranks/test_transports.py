"""All transports pass one contract."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hvd_sketch.transport import local_transports, resolve_transport, run_local
from tests.support.harness import launch
from tests.support.worlds import Job, register

CHECKS = 9  # in tests/support/contract.py
CONTRACT = "tests.support.contract:check_all"
# Where, and how: in chunks, as for vectors longer than MPI's counts allow, with the limit lowered; through the copies
# on the host that a device would need (pinned memory and streams take a GPU); by what NCCL would do, over Gloo.
WORLDS: list[tuple[str, int, dict[str, Any]]] = [
    *(("torch", ranks, {}) for ranks in (1, 2, 3, 4)),
    ("torch", 2, {"staged": True}),
    ("torch", 3, {"own_collectives": True}),
    *(("mpi", ranks, {}) for ranks in (1, 2, 3, 4)),
    ("mpi", 3, {"max_count": 50}),
    ("mpi", 3, {"max_count": 999}),
    ("mpi", 2, {"staged": True}),
    ("horovod-gloo", 2, {}),
    ("horovod-gloo", 2, {"staged": True}),
    ("horovod-gloo", 3, {}),
    ("horovod-gloo", 2, {"carrier": "horovod"}),
    ("horovod-gloo", 2, {"carrier": "horovod", "staged": True}),
    ("horovod-gloo", 3, {"carrier": "horovod"}),
    ("horovod-mpi", 2, {}),
    ("horovod-mpi", 2, {"carrier": "torch"}),
    ("horovod-mpi", 2, {"carrier": "horovod"}),
    *((kind, 4, {"grid": True}) for kind in ("torch", "mpi", "horovod-gloo")),
]
CONTRACTS = [
    pytest.param(register(kind, ranks, CONTRACT, **how), id=f"{kind}-{ranks}-{how}") for kind, ranks, how in WORLDS
]
MESSAGE_BEYOND_2_GIB = register("mpi", 1, "tests.support.contract:length_of_a_message_beyond_2_gib")
ARRIVES_BY_ITSELF = register("mpi", 2, "tests.support.contract:arrives_by_itself")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_contract_between_threads(ranks: int) -> None:
    assert launch("local", ranks, CONTRACT) == [CHECKS] * ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("job", CONTRACTS)
def test_contract_between_processes(job: Job) -> None:
    assert job.results() == [CHECKS] * job.world.ranks


@pytest.mark.multiprocess
def test_mpi_messages_may_exceed_2_gib() -> None:
    """Fewer elements than MPI's counts allow may be more bytes."""
    assert MESSAGE_BEYOND_2_GIB.results() == [2**29]


@pytest.mark.multiprocess
def test_messages_of_mpi_travel_while_a_rank_computes() -> None:
    """Over TCP nothing larger than 64 KiB arrives unless somebody calls MPI."""
    assert ARRIVES_BY_ITSELF.results() == [True, True]


def test_a_failing_thread_releases_the_others() -> None:
    def fail_on_one(transport):
        if transport.rank == 1:
            raise RuntimeError("rank 1 failed")
        transport.barrier()

    with pytest.raises(RuntimeError, match="rank 1 failed"):
        run_local(3, fail_on_one)


def test_a_missing_thread_is_noticed() -> None:
    alone = local_transports(2, timeout_s=0.1)[0]
    with pytest.raises(threading.BrokenBarrierError):
        alone.allreduce_(torch.ones(1))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'auto', 'torch', 'horovod', 'mpi' or a Transport"):
        resolve_transport("smoke signals")
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        local_transports(0)
    with pytest.raises(ValueError, match="one share for each of the 2 ranks"):
        local_transports(2)[0].reduce_scatter(torch.ones(3))
