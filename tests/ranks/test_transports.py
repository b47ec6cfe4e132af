"""All transports pass one contract."""

from __future__ import annotations

import threading

import pytest
import torch

from hvd_sketch.transport import local_transports, resolve_transport, run_local
from tests.support.harness import launch

CHECKS = 9  # in tests/support/contract.py
WORLDS = [("local", 1), ("local", 2), ("local", 3), ("local", 4)]
PROCESS_WORLDS = [
    ("mpi", 1),
    ("mpi", 2),
    ("mpi", 3),
    ("mpi", 4),
    ("horovod-gloo", 2),
    ("horovod-gloo", 3),
    ("horovod-mpi", 2),
]


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_contract_between_threads(kind: str, ranks: int) -> None:
    assert launch(kind, ranks, "tests.support.contract:check_all") == [CHECKS] * ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "ranks"), PROCESS_WORLDS)
def test_contract_between_processes(kind: str, ranks: int) -> None:
    assert launch(kind, ranks, "tests.support.contract:check_all") == [CHECKS] * ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("max_count", [50, 999])
def test_mpi_in_chunks(max_count: int) -> None:
    """Vectors longer than MPI's counts allow, with the limit lowered."""
    assert launch("mpi", 3, "tests.support.contract:check_all", max_count=max_count) == [CHECKS] * 3


@pytest.mark.multiprocess
def test_mpi_messages_may_exceed_2_gib() -> None:
    """Fewer elements than MPI's counts allow may be more bytes."""
    assert launch("mpi", 1, "tests.support.contract:length_of_a_message_beyond_2_gib") == [2**29]


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["mpi", "horovod-gloo"])
def test_staged_through_host_copies(kind: str) -> None:
    """The copies a device would need, made of tensors on the host; pinned memory and streams take a GPU."""
    assert launch(kind, 2, "tests.support.contract:check_all", staged=True) == [CHECKS] * 2


@pytest.mark.multiprocess
def test_messages_of_mpi_travel_while_a_rank_computes() -> None:
    """Over TCP nothing larger than 64 KiB arrives unless somebody calls MPI."""
    assert launch("mpi", 2, "tests.support.contract:arrives_by_itself") == [True, True]


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
    with pytest.raises(ValueError, match="'horovod', 'mpi' or a Transport"):
        resolve_transport("smoke signals")
    with pytest.raises(ValueError, match="size must be at least 1"):
        local_transports(0)
    with pytest.raises(ValueError, match="one part for each of the 2 ranks"):
        local_transports(2)[0].reduce_scatter(torch.ones(3))
