"""TorchTransport on groups and dimensions of a mesh, beside the user's own traffic; and what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch

from hvd_sketch.transport import run_local
from tests.support.group_main import EXCHANGE
from tests.support.harness import run_command
from tests.support.targets import run_steps
from tests.support.worlds import register

pytestmark = pytest.mark.multiprocess

TARGETS = "tests.support.torch_targets"
MESHES = register("torch", 4, f"{TARGETS}:meshes")
COLUMNS = register("torch", 4, f"{TARGETS}:exchanges_along_a_mesh")
BESIDE = {ranks: register("torch", ranks, f"{TARGETS}:beside_the_users_traffic") for ranks in (2, 3)}
MANY = register("torch", 2, f"{TARGETS}:many_groups", cycles=50)
NO_SYNC = register("torch", 2, f"{TARGETS}:trains_under_no_sync")
AGAIN = register("torch", 2, f"{TARGETS}:begins_again", is_last=True)
REFUSED = register("torch", 3, f"{TARGETS}:refused_groups")
DOES_NOT_COME = register("torch", 2, f"{TARGETS}:does_not_come")
KEPT_WAITING = register("torch", 2, f"{TARGETS}:kept_waiting")


def test_exchanges_along_one_dimension_of_a_mesh() -> None:
    for rank, result in enumerate(MESHES.results()):
        row, column = divmod(rank, 2)
        along_replicate, along_shard = 10.0**column + 10.0 ** (column + 2), 11 * 100.0**row
        assert result["sums"] == {"replicate": along_replicate, "shard": along_shard, "number": along_replicate}
        assert result["places"] == [(row, 2), (column, 2), (row, 2)]
        said = result["said"]
        assert (
            "one dimension of a DeviceMesh of dimensions 'replicate', 'shard': pass mesh['rep" in said["no dimension"]
        )
        assert said["no such"].startswith(
            "ValueError: TorchTransport got dim='nodes', but has a DeviceMesh of dimensions"
        )
        assert said["no such number"].startswith("ValueError: TorchTransport got dim=2")
        assert said["dim of a group"].startswith("ValueError: dim names a dimension of a DeviceMesh, got dim='shard'")


def test_a_column_of_a_mesh_exchanges_as_threads_do() -> None:
    threads = run_local(2, lambda transport: run_steps(transport, **EXCHANGE))
    for result, expected in zip(COLUMNS.results(), [threads[0], threads[0], threads[1], threads[1]], strict=True):
        assert all(map(torch.equal, result["values"], expected["values"]))
        assert torch.equal(result["residual"], expected["residual"])


@pytest.mark.parametrize("ranks", BESIDE)
def test_messages_do_not_meet_the_users(ranks: int) -> None:
    assert BESIDE[ranks].results() == [True] * ranks


def test_destroying_a_group_frees_ours() -> None:
    assert MANY.results() == [{"threads": 0}] * 2


def test_a_world_that_begins_again_is_another_one() -> None:
    assert AGAIN.results() == [[2.0, 2.0]] * 2


def test_a_ddp_model_under_no_sync_trains_as_the_plain_model() -> None:
    ranks = NO_SYNC.results()
    for result in ranks:
        assert torch.equal(result["ddp"], result["plain"]) and torch.equal(result["ddp"], ranks[0]["ddp"])
    assert not torch.equal(ranks[0]["own gradient"], ranks[1]["own gradient"]), "DDP has averaged them"


# What is refused


def test_what_is_no_group_is_refused() -> None:
    for rank, said in enumerate(REFUSED.results()):
        for name in ("int", "list"):
            assert said[name].startswith(
                "TypeError: TorchTransport expected a torch.distributed.ProcessGroup or a DeviceM"
            )
            assert f"({name}) on rank {rank} of 3" in said[name]
        assert said["not in it"].startswith("ValueError: ") and f"without rank {rank} of 3" in said["not in it"]
        assert "destroy_process_group has ended" in said["destroyed"] and said["destroyed"].startswith("ValueError: ")


@pytest.mark.parametrize("case", ["two groups", "in a circle", "twins"])
def test_ranks_that_wait_on_different_groups_are_all_refused(case: str) -> None:
    for rank, said in enumerate(REFUSED.results()):
        assert said[case].startswith(f"ValueError: rank {rank} has waited for ranks ")
        assert "waits on another one, or has given up: give the same group on all of its ranks" in said[case]


def test_a_rank_that_does_not_come_is_named_and_may_come_later() -> None:
    first, late = DOES_NOT_COME.results()
    assert first["said"][0].endswith("for 3 s, but ranks [1] did not come") and late["said"][0] == ""
    assert "but rank 0 waits on another one, or has given up: give" in late["said"][1] and first["said"][1] == ""
    assert first["sum"] == late["sum"] == 2


def test_a_timeout_names_the_rank_the_step_and_the_phase() -> None:
    error, note = KEPT_WAITING.results()[0]
    assert error.startswith("rank 0 of 2 waited in vain for a message from rank 1: ") and "5000ms" in error
    assert note == "rank 0 of 2 was in step 1, phase 'agree'"


def test_without_torchrun_the_error_says_what_is_missing() -> None:
    program = "import hvd_sketch; hvd_sketch.TorchTransport()"
    command = ["env", "-u", "RANK", "WORLD_SIZE=2", "MASTER_ADDR=localhost", sys.executable, "-c", program]
    status, output = run_command(command, timeout_s=60)
    assert status == 1
    assert "ValueError: transport 'torch' expected a process group or torchrun's variables" in output
    assert "RANK, MASTER_PORT is not set: start the ranks with torchrun" in output
