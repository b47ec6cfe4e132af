"""A failing module or command ends the job as a failing script does, and ranks see what they should.

tests/faults has failing scripts, under every launcher.
"""

from __future__ import annotations

import sys

import pytest

from tests.support.harness import run_command

COMMAND = "import sys; from tests.faults.without_us import main; main(*sys.argv[1:])"


@pytest.mark.multiprocess
@pytest.mark.parametrize("form", [["-m", "tests.faults.without_us"], ["-c", COMMAND]], ids=["module", "command"])
def test_failing_module_or_command_ends_the_job_under_mpirun(tmp_path, form):
    job = [sys.executable, *form, "mpi", "raise@inside", str(tmp_path)]
    status, output = run_command(["launch/mpirun.sh", "-n", "3", "--", *job], timeout_s=60)
    assert (tmp_path / "failed_at").exists(), output
    assert status != 0 and "rank 1 fails on purpose" in output, output


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", ["torchrun.sh", "mpirun.sh", "horovodrun.sh"])
def test_ranks_see_their_threads_and_the_users_variables(tmp_path, launcher):
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys\n"
        "names = 'OMP_NUM_THREADS', 'NUMBA_NUM_THREADS', 'HVD_SKETCH_TEST'\n"
        "ranks = 'RANK', 'HOROVOD_RANK', 'OMPI_COMM_WORLD_RANK'\n"
        "rank = next(os.environ[name] for name in ranks if name in os.environ)\n"
        "open(f'{sys.argv[1]}/{rank}', 'w').write(' '.join(os.environ[name] for name in names))\n"
    )
    status, output = run_command(
        [f"launch/{launcher}", "-n", "2", "--threads", "2", "--", sys.executable, str(job), str(tmp_path)],
        timeout_s=60,
        HVD_SKETCH_TEST="a b",
    )
    assert status == 0, output
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 2 a b"] * 2
