"""HorovodTransport: what carries the data under either controller, and what is left after an error."""

from __future__ import annotations

import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvd_sketch.transport.horovod_addresses import INTERFACE_VARIABLES, addresses_towards, own_addresses
from hvd_sketch.transport.local import local_transports
from hvd_sketch.transport.stall import ABORT_VARIABLE, STALL_VARIABLE
from tests.support.harness import LAUNCHERS, run_command
from tests.support.worlds import register

pytestmark = pytest.mark.skipif(
    find_spec("horovod") is None, reason="Horovod is not installed: launch/setup.sh builds it"
)

TARGETS = "tests.support.horovod_targets"
CARRIERS = {kind: register(kind, 2, f"{TARGETS}:carriers") for kind in ("horovod-gloo", "horovod-mpi")}
LOST = register("horovod-gloo", 2, f"{TARGETS}:part_of_a_lost_rank")
SLOTS = register("horovod-mpi", 2, f"{TARGETS}:slots_left")
LOOPBACK = "127.0.0.1"


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", CARRIERS)
def test_what_carries_the_data_under_either_controller(kind: str) -> None:
    is_mpi = kind == "horovod-mpi"
    for rank, used in enumerate(CARRIERS[kind].results()):
        assert used["auto"] == ("mpi" if is_mpi else "torch")
        assert (used["torch"], used["horovod"]) == ("torch", "horovod")
        refusal = "" if is_mpi else f"on all ranks (seen from rank {rank})"
        assert refusal in used["mpi"] and bool(used["mpi"]) == bool(refusal)
        assert used["nowhere"] == "horovod"
        told = f"of rank 0's IPv4 addresses ({LOOPBACK}) rank 1 of 2 cannot connect. Name an interface that all hosts"
        assert [told in said for said in used["said"]] == [True] * (rank == 0), used["said"]


@pytest.mark.multiprocess
def test_ranks_say_that_they_wait_in_horovods_own_collectives(tmp_path: Path) -> None:
    job = [sys.executable, "-m", "tests.faults.job", "horovod-own", "hang@data", str(tmp_path)]
    settings = {STALL_VARIABLE: "2", ABORT_VARIABLE: "5"}
    status, output = run_command([*LAUNCHERS["horovod-mpi"], "-n", "2", "--", *job], timeout_s=120, **settings)
    assert status != 0, output
    assert re.search("rank 0 of 2 has waited for .* in step 3, phase 'agree'", output), output


@pytest.mark.multiprocess
def test_a_part_fails_as_horovod_does() -> None:
    assert LOST.results()[0].startswith("rank 0 of 2 waited in vain for ")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("a broadcast", "rank 1 is done"),
        ("a step", "rank 1 of 2 ends, in phase 'a step': the program of rank 0 is over"),
        ("late", "MPI, which carries the data of this Horovod job, has ended on all ranks"),
        ("a meeting", "rank 1 of 2 has come to 'meet', but the program of rank 0 is over"),
        ("a shutdown", "rank 1 of 2 ends, in phase 'a step': the program of rank 0 is over"),
    ],
)
@pytest.mark.daily
def test_the_end_of_horovod_does_not_end_mpi_under_a_rank_that_waits(what: str, told: str) -> None:
    job = [*LAUNCHERS["horovod-mpi"], "-n", "2", "--", sys.executable, "-m", "tests.support.horovod_end_main", what]
    status, output = run_command(job, timeout_s=60, **{STALL_VARIABLE: "2"})
    assert (status == 0) == (what == "a broadcast"), output
    assert told in output and "MPI_FINALIZE" not in output, output


@pytest.mark.multiprocess
def test_collectives_that_fail_leave_no_slot() -> None:
    assert SLOTS.results() == [[0, 0]] * 2


@pytest.mark.parametrize(
    ("variable", "named", "expected"),
    [
        (INTERFACE_VARIABLES[0], "lo", [LOOPBACK]),
        (INTERFACE_VARIABLES[0], "nowhere0", []),
        (INTERFACE_VARIABLES[1], "lo", [LOOPBACK]),
        (INTERFACE_VARIABLES[2], "nowhere0,lo", [LOOPBACK]),
        (INTERFACE_VARIABLES[2], "127.0.0.0/8", [LOOPBACK]),
        (INTERFACE_VARIABLES[2], "10.0.0.0/33", []),
        (INTERFACE_VARIABLES[3], "lo", [LOOPBACK]),
        (INTERFACE_VARIABLES[3], "l", [LOOPBACK]),
        (INTERFACE_VARIABLES[3], "=l", []),
        (INTERFACE_VARIABLES[3], "=nowhere0,lo", [LOOPBACK]),
    ],
)
def test_interfaces_are_those_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, named: str, expected: list[str]
) -> None:
    for each in INTERFACE_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    assert own_addresses()[-1] == LOOPBACK, "all of them, and loopback after the others"
    monkeypatch.setenv(INTERFACE_VARIABLES[3], "eth9")
    monkeypatch.setenv(variable, named)  # which counts before it, or in its place
    assert own_addresses() == expected


def test_addresses_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "lo")
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        assert list(addresses_towards(["127.0.0.2", LOOPBACK], port)) == ["-", LOOPBACK]
    assert list(addresses_towards([LOOPBACK], port)) == ["-"]


def test_a_transport_does_not_outlive_its_horovod() -> None:
    """After a reset the ranks may be others, which wait for this one elsewhere."""
    from hvd_sketch.transport.horovod_errors import FailingAsHorovod

    horovod = SimpleNamespace(rank=lambda: 0, size=lambda: 1, is_initialized=lambda: True)
    transport = FailingAsHorovod(horovod, local_transports(1)[0])
    assert transport.allreduce_(torch.ones(2)).tolist() == [1, 1]
    horovod.size = lambda: 3
    told = "built as Horovod's rank 0 of 1, which is rank 0 of 3 now: wrap .* hvd_sketch.elastic.SketchState"
    for collective in (transport.allreduce_, transport.allgather, transport.broadcast_):
        with pytest.raises(ValueError, match=told):
            collective(torch.ones(2))
    horovod.is_initialized = lambda: False
    assert transport.allreduce_(torch.ones(2)).tolist() == [1, 1], "what carries the data needs no Horovod"
