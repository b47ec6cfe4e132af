"""The launch scripts: their command lines, what they refuse, the set-up, and that one failing rank ends a job."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.support.harness import ROOT, run_command

VENV = str(Path(sys.prefix).resolve())
THREADS = "-x OMP_NUM_THREADS={0} -x NUMBA_NUM_THREADS={0} -x MKL_NUM_THREADS={0}"
THREADS_ENV = "env OMP_NUM_THREADS={0} NUMBA_NUM_THREADS={0} MKL_NUM_THREADS={0}"
LAUNCH_SCRIPTS = ["setup.sh", "test.sh", "quickstart.sh", "mpirun.sh", "horovodrun.sh"]
EAGER = "--mca btl_tcp_eager_limit 2097152 --mca btl_tcp_rndv_eager_limit 2097152"
PREFIX = f"--prefix {VENV}"
TCP = f"--mca oob_tcp_if_include eth0 --mca btl_tcp_flags send\\,inplace --mca btl_tcp_sndbuf 131072 {EAGER}"
YIELD = "--mca mpi_yield_when_idle 1"
FORWARDED = "-x PATH -x OPAL_PREFIX -x HVD_SKETCH_VENV"
JOB_END_LIMIT_S = 30


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path):
    """Runs a script with nothing in its environment but what is given, on a machine that seems to have 8 cores."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "nproc", "#!/bin/sh\necho 8\n")
    script(tools / "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')

    def run(*command: str, **variables: str) -> tuple[int, str]:
        variables = {"PATH": f"{tools}:/usr/bin:/bin", "HVD_SKETCH_VENV": VENV, "OPAL_PREFIX": VENV} | variables
        return run_command(["env", "-i", *(f"{n}={v}" for n, v in variables.items()), *command], timeout_s=60)

    return run


@pytest.fixture
def hosts(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two of them\nnode1 slots=2\n\n  node2   slots=4 max_slots=8")
    return str(file)


@pytest.fixture
def host_files(tmp_path, hosts):
    crowded = tmp_path / "crowded"
    crowded.write_text("node1 slots=12\n")
    return {"hosts": hosts, "crowded": str(crowded)}


def in_one_word(*arguments: str) -> str:
    """Arguments that a shell reads twice, as bash's ``%q`` quotes them the second time."""
    return " ".join(arguments).replace("\\", "\\\\").replace(",", "\\,").replace(" ", "\\ ")


def without_notes(output: str) -> str:
    return "".join(line for line in output.splitlines(keepends=True) if " ranks share 8 cores" not in line)


# Command lines


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            "-n 3 -- python train.py --epochs 2",
            f"mpirun -n 3 --map-by slot --bind-to none --oversubscribe {THREADS.format(2)} {FORWARDED} "
            "python -m mpi4py train.py --epochs 2",
        ),
        (
            "--ranks 2 --threads 3 --interface eth0 ./program -n 5",
            "mpirun -n 2 --map-by slot --bind-to none --oversubscribe --mca pml ob1 --mca btl tcp\\,self "
            f"--mca btl_tcp_if_include eth0 {TCP} {THREADS.format(3)} {FORWARDED} ./program -n 5",
        ),
        (
            "--hosts {hosts} -- python train.py",
            f"mpirun -n 6 --map-by slot --bind-to none --hostfile {{hosts}} {PREFIX} {THREADS.format(2)} "
            f"{FORWARDED} python -m mpi4py train.py",
        ),
        (
            "--hosts {hosts} -n 1 -- python train.py",
            f"mpirun -n 1 --map-by slot --bind-to none --hostfile {{hosts}} {PREFIX} {THREADS.format(8)} "
            f"{FORWARDED} python -m mpi4py train.py",
        ),
        (
            "--hosts {crowded} -n 9 -- ls",
            f"mpirun -n 9 --map-by slot --bind-to none --hostfile {{crowded}} {PREFIX} {YIELD} {THREADS.format(1)} "
            f"{FORWARDED} ls",
        ),
    ],
)
def test_mpirun_command_line(bare, host_files, arguments, expected):
    status, output = bare("launch/mpirun.sh", "--dry-run", *arguments.format(**host_files).split())
    assert (status, without_notes(output)) == (0, expected.format(**host_files) + "\n")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("-n 3 -- python train.py", f"{THREADS_ENV.format(2)} horovodrun -np 3 -H localhost:3 --gloo python train.py"),
        (
            "--hosts {hosts} --threads 1 --interface eth0 -- python train.py",
            f"{THREADS_ENV.format(1)} horovodrun -np 6 -H node1:2\\,node2:4 --gloo --network-interfaces eth0 "
            "python train.py",
        ),
        (
            "--hosts {hosts} -n 5 --mpi --interface eth0 -- python train.py",
            f"{THREADS_ENV.format(2)} horovodrun -np 5 -H node1:2\\,node2:3 --mpi --network-interfaces eth0 "
            f"--mpi-args={in_one_word(PREFIX, TCP)} python train.py",
        ),
        (
            "--hosts {hosts} -n 2 ls",
            f"{THREADS_ENV.format(4)} horovodrun -np 2 -H node1:2 --gloo ls",
        ),
        ("-n 1 --mpi ls", f"{THREADS_ENV.format(8)} horovodrun -np 1 -H localhost:1 --mpi ls"),
        (
            "-n 9 --mpi ls",
            f"{THREADS_ENV.format(1)} horovodrun -np 9 -H localhost:9 --mpi --mpi-args={in_one_word(YIELD)} ls",
        ),
        (
            "--hosts {crowded} --mpi ls",
            f"{THREADS_ENV.format(1)} horovodrun -np 12 -H node1:12 --mpi --mpi-args={in_one_word(PREFIX, YIELD)} ls",
        ),
        ("-n 9 ls", f"{THREADS_ENV.format(1)} horovodrun -np 9 -H localhost:9 --gloo ls"),
    ],
)
def test_horovodrun_command_line(bare, host_files, arguments, expected):
    status, output = bare("launch/horovodrun.sh", "--dry-run", *arguments.format(**host_files).split())
    assert (status, without_notes(output)) == (0, expected.format(**host_files) + "\n")


@pytest.mark.parametrize(
    "command, expected",
    [
        ("python3.11 -m package.train", "python3.11 -m mpi4py -m package.train"),
        ("/opt/bin/python -u -W error -X dev train.py", "/opt/bin/python -u -W error -X dev -m mpi4py train.py"),
        ("python -c pass", "python -m mpi4py -c pass"),
        ("python -", "python -m mpi4py -"),
        ("python -m mpi4py train.py", "python -m mpi4py train.py"),
        ("python -S train.py", "python -S train.py"),  # no site-packages, no mpi4py
        ("python --version", "python --version"),
        ("python", "python"),
        ("./train.py", "./train.py"),
        ("pythonic train.py", "pythonic train.py"),
    ],
)
def test_python_commands_run_under_the_aborting_runner(bare, command, expected):
    status, output = bare("launch/mpirun.sh", "--dry-run", "-n", "1", "--", *command.split())
    assert status == 0
    assert output.rstrip().endswith(f"{FORWARDED} {expected}")


def test_command_line_is_one_quoted_line(bare):
    _, output = bare("launch/mpirun.sh", "--dry-run", "-n", "1", "--", "python", "-c", "print('a b')\nprint(2)")
    assert output.endswith("python -m mpi4py -c $'print(\\'a b\\')\\nprint(2)'\n")
    assert output.count("\n") == 1


def test_mpirun_forwards_what_is_set_and_no_more(bare):
    names = ["HOROVOD_X", "NCCL_DEBUG", "HVD_SKETCH_A", "PYTHONPATH", "LD_LIBRARY_PATH", "OTHER", "TORCH_HOME"]
    variables = dict.fromkeys([*names, "NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"], "1")
    _, output = bare("launch/mpirun.sh", "--dry-run", "-n", "1", "ls", **variables)
    assert (
        "-x PATH -x OPAL_PREFIX -x LD_LIBRARY_PATH -x PYTHONPATH -x HOROVOD_X -x HVD_SKETCH_A -x HVD_SKETCH_VENV "
        "-x NCCL_DEBUG -x NUMBA_CACHE_DIR -x TORCH_HOME ls"
    ) in output


def test_threads_come_from_the_option_then_the_environment(bare):
    arguments = ["launch/mpirun.sh", "--dry-run", "-n", "2"]
    assert THREADS.format(5) in bare(*arguments, "ls", OMP_NUM_THREADS="5")[1]
    assert THREADS.format(7) in bare(*arguments, "--threads", "7", "ls", OMP_NUM_THREADS="5")[1]
    assert THREADS.format(4) in bare(*arguments, "ls", OMP_NUM_THREADS="4,2")[1]  # nested: not a count of ours


def test_more_ranks_than_cores_is_only_a_note(bare):
    status, output = bare("launch/mpirun.sh", "--dry-run", "-n", "9", "ls")
    assert status == 0
    assert "9 ranks share 8 cores" in output
    assert THREADS.format(1) in output


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("", "launch/mpirun.sh -n 4 {module} --transport mpi"),
        (
            "--ranks 2 --json out.json --seeds 1",
            "launch/mpirun.sh -n 2 {module} --transport mpi --json out.json --seeds 1",
        ),
        (
            "--plot p.png --launcher horovodrun -- --ranks 9",
            "launch/horovodrun.sh -n 4 {module} --transport horovod --plot p.png --ranks 9",
        ),
    ],
)
def test_quickstart_command_line(bare, arguments, expected):
    launcher, *line = expected.format(module="python -P -m benchmarks.quickstart").split()
    expected_output = bare(launcher, "--dry-run", *line[:2], "--", *line[2:], PYTHONPATH=str(ROOT))[1]
    assert "benchmarks.quickstart" in expected_output
    assert bare("launch/quickstart.sh", "--dry-run", *arguments.split()) == (0, expected_output)


def test_slurm_template_builds_its_host_file(bare):
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "3"}
    arguments = ["bash", "launch/slurm.sbatch", "--dry-run", "--interface", "ib0", "--", "python", "train.py"]
    status, output = bare(*arguments, **job, SLURM_SUBMIT_DIR=str(ROOT))
    assert status == 0
    assert output.startswith("mpirun -n 8 ")
    assert f" {THREADS.format(3)} " in output
    assert " --hostfile " in output and "btl_tcp_if_include ib0" in output
    assert output.endswith("python -m mpi4py train.py\n")


def test_slurm_template_outside_slurm(bare):
    status, output = bare("bash", "launch/slurm.sbatch", "python", "train.py")
    assert status != 0
    assert "sbatch" in output


# What they refuse


@pytest.mark.parametrize("name", LAUNCH_SCRIPTS)
def test_help(bare, name):
    status, output = bare(f"launch/{name}", "--help")
    assert status == 0
    assert output.startswith(f"usage: launch/{name}")


@pytest.mark.parametrize("name", ["mpirun.sh", "horovodrun.sh"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--speed 3 -- ls", "unknown option --speed"),
        ("-n 0 -- ls", "-n expects a whole number of at least 1, got '0'"),
        ("--ranks two -- ls", "--ranks expects a whole number of at least 1, got 'two'"),
        ("-n 2 --threads -1 ls", "--threads expects a whole number of at least 1, got '-1'"),
        ("-n", "-n expects a value"),
        ("-n 2", "expected a command"),
        ("-n 2 --", "expected a command"),
        ("-- ls", "expected -n N or --hosts FILE"),
        ("--hosts nowhere ls", "cannot read 'nowhere'"),
        ("--hosts {empty} ls", "at least one line 'host slots=N'"),
        ("--hosts {wrong} ls", "line 2: expected 'host slots=N', got 'node2 slots=none'"),
        ("--hosts {hosts} -n 7 ls", "7 ranks asked for, but {hosts} has 6 slots"),
    ],
)
def test_bad_use_exits_with_2_and_says_why(bare, tmp_path, hosts, name, arguments, message):
    files = {"hosts": hosts, "empty": str(tmp_path / "empty"), "wrong": str(tmp_path / "wrong")}
    Path(files["empty"]).write_text("\n# nothing\n")
    Path(files["wrong"]).write_text("node1 slots=1\nnode2 slots=none\n")
    status, output = bare(f"launch/{name}", "--dry-run", *arguments.format(**files).split())
    assert status == 2
    assert message.format(**files) in output
    assert output.startswith(f"launch/{name}: ") and output.count("\n") == 1


@pytest.mark.parametrize(
    "command, message",
    [
        ("mpirun.sh --gloo -n 2 ls", "unknown option --gloo"),
        ("quickstart.sh --launcher srun", "mpirun or horovodrun, got 'srun'"),
        ("quickstart.sh --ranks 0", "whole number of at least 1"),
        ("setup.sh --fast", "expected no arguments, got '--fast'"),
    ],
)
def test_bad_use_of_one_script(bare, command, message):
    status, output = bare(f"launch/{command.split()[0]}", *command.split()[1:])
    assert status == 2
    assert message in output


def test_missing_environment_names_the_set_up(bare):
    status, output = bare("launch/mpirun.sh", "-n", "1", "ls", HVD_SKETCH_VENV="/nowhere")
    assert status == 2
    assert "run launch/setup.sh" in output


# Set-up, with a stand-in for Python that only notes what it is asked for

STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    --version) echo Python 3.12.0 ;;
    "-m venv "*) for venv; do :; done; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"; touch "$venv/pyvenv.cfg" ;;
    "-m pip "*download*) echo no such archive; exit 1 ;;
    "- "*) echo key ;;
esac
"""


class SetUp:
    """A checkout in a temporary folder, and how often its set-up asked for what."""

    def __init__(self, folder: Path, bare):
        self.folder, self._bare = folder, bare
        self.checkout, self.calls_file = folder / "checkout", folder / "calls"
        self.python = script(folder / "python-stand-in", STAND_IN)
        self.wheel = folder / "cache/wheels/key/horovod-0.28.1-any.whl"
        self.wheel.parent.mkdir(parents=True)
        self.wheel.touch()
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        shutil.copy(ROOT / "setup.cfg", self.checkout)

    def run(self, **variables: str) -> tuple[int, str, str]:
        """Exit status, output, and the calls of the stand-in."""
        self.calls_file.write_text("")
        defaults = {
            "PYTHON": str(self.python),
            "CALLS": str(self.calls_file),
            "HVD_SKETCH_CACHE": str(self.folder / "cache"),
            "HVD_SKETCH_VENV": "",
        }
        status, output = self._bare(str(self.checkout / "launch/setup.sh"), **(defaults | variables))
        return status, output, self.calls_file.read_text()


@pytest.fixture
def set_up(tmp_path, bare):
    return SetUp(tmp_path, bare)


def test_set_up_installs_then_has_nothing_to_do(set_up):
    status, output, calls = set_up.run()
    assert status == 0, output
    installs = [line for line in calls.splitlines() if " install " in line]
    assert " torch " in installs[0]
    assert "-e .[mpi,gpu,examples,paper,integrations,test,dev]" in installs[1]
    assert str(set_up.wheel) in installs[2]
    assert calls.splitlines()[-1] == "-m hvd_sketch warm-up"

    start_s = time.monotonic()
    status, output, calls = set_up.run()
    assert (status, calls) == (0, "")
    assert "nothing to do" in output
    assert time.monotonic() - start_s < 1


@pytest.mark.parametrize("changed", ["launch/setup.sh", "launch/constraints.txt", "setup.cfg"])
def test_set_up_runs_again_when_its_inputs_change(set_up, changed):
    set_up.run()
    with (set_up.checkout / changed).open("a") as file:
        file.write("\n# changed\n")
    status, _, calls = set_up.run()
    assert status == 0
    assert " install " in calls and " venv " not in calls


def test_set_up_makes_a_moved_environment_anew(set_up):
    set_up.run()
    set_up.checkout = set_up.checkout.rename(set_up.folder / "moved")
    status, _, calls = set_up.run()
    assert status == 0
    assert f"-m venv --clear {set_up.checkout}/.venv" in calls


def test_set_up_serves_another_checkout_in_the_same_environment(set_up):
    shared = str(set_up.folder / "shared")
    set_up.run(HVD_SKETCH_VENV=shared)
    set_up.checkout = Path(shutil.copytree(set_up.checkout, set_up.folder / "other"))
    _, _, calls = set_up.run(HVD_SKETCH_VENV=shared)
    assert "-e .[" in calls and " venv " not in calls


def test_set_up_shows_why_the_build_failed_and_is_not_done(set_up):
    set_up.wheel.unlink()
    for _ in range(2):
        status, output, _ = set_up.run(CXX="true")
        assert status == 1
        assert "no such archive" in output
        assert f"all of it in {set_up.folder}/cache/wheels/key.log" in output
        assert not list(set_up.folder.glob("cache/build.*"))


def test_set_up_without_compiler_says_so_before_it_downloads(set_up):
    tools = set_up.folder / "no-compiler"
    tools.mkdir()
    for name in ["bash", "env", "dirname", "basename", "sed", "mkdir", "sha256sum", "flock", "cat"]:
        (tools / name).symlink_to(shutil.which(name))
    set_up.wheel.unlink()
    status, output, calls = set_up.run(PATH=str(tools))
    assert (status, calls) == (1, "")
    assert "expected a C++ compiler" in output


def test_set_up_refuses_an_old_python(set_up):
    old = script(set_up.folder / "old", '#!/bin/sh\n[ "$*" = --version ] && echo Python 3.9.2\n')
    status, output, _ = set_up.run(PYTHON=str(old))
    assert status == 1
    assert "expected Python 3.11 or newer, found Python 3.9.2" in output


def test_set_up_leaves_other_files_alone(set_up):
    place = set_up.folder / "mine"
    place.mkdir()
    (place / "thesis.tex").touch()
    status, output, _ = set_up.run(HVD_SKETCH_VENV=str(place))
    assert status == 1
    assert "found other files" in output
    assert [file.name for file in place.iterdir()] == ["thesis.tex"]


# One failing rank ends the job

FAULT = """
import os, pathlib, signal, sys
fault, moment, marker = sys.argv[1:]
rank = os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]

def reach(here):
    if rank == "1" and moment == here:
        pathlib.Path(marker).touch()
        if fault == "raise":
            raise RuntimeError("boom")
        if fault == "exit":
            sys.exit(3)
        os.kill(os.getpid(), signal.Signals[fault])

reach("before")
"""
FAULT_MPI = """
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
reach("inside")
MPI.COMM_WORLD.Barrier()
"""
FAULT_HOROVOD = """
import horovod.torch as hvd
import torch
hvd.init()
hvd.allreduce(torch.ones(3), name="first")
reach("inside")
hvd.allreduce(torch.ones(3), name="second")
"""


def run_faulty(folder: Path, launcher: list[str], command: list[str], fault: str, moment: str) -> str:
    """The output of a job with a fault, which must end in time, and not with status 0."""
    marker = folder / "marker"
    status, output = run_command(
        [*launcher, "--", *command, fault, moment, str(marker)], timeout_s=120, PYTHONPATH=str(folder)
    )
    assert marker.exists(), output
    assert status != 0, output
    elapsed_s = time.time() - marker.stat().st_mtime
    assert elapsed_s < JOB_END_LIMIT_S, f"the job ended {elapsed_s:.1f} s after its fault:\n{output}"
    return output


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["before", "inside"])
@pytest.mark.parametrize("fault", ["raise", "exit", "SIGKILL", "SIGSEGV"])
def test_failing_rank_ends_the_job_under_mpirun(tmp_path, fault, moment):
    job = script(tmp_path / "job.py", FAULT + FAULT_MPI)
    output = run_faulty(tmp_path, ["launch/mpirun.sh", "-n", "3"], [sys.executable, str(job)], fault, moment)
    assert ("RuntimeError: boom" in output) == (fault == "raise")


@pytest.mark.multiprocess
@pytest.mark.parametrize("form", [["-m", "job"], ["-c", "import job"]], ids=["module", "command"])
def test_failing_module_or_command_ends_the_job_under_mpirun(tmp_path, form):
    script(tmp_path / "job.py", FAULT + FAULT_MPI)
    run_faulty(tmp_path, ["launch/mpirun.sh", "-n", "3"], [sys.executable, *form], "raise", "inside")


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["before", "inside"])
@pytest.mark.parametrize("fault", ["raise", "exit", "SIGKILL"])
@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_failing_rank_ends_the_job_under_horovodrun(tmp_path, controller, fault, moment):
    job = script(tmp_path / "job.py", FAULT + FAULT_HOROVOD)
    launcher = ["launch/horovodrun.sh", controller, "-n", "2"]
    run_faulty(tmp_path, launcher, [sys.executable, str(job)], fault, moment)


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", ["mpirun.sh", "horovodrun.sh"])
def test_ranks_see_their_threads_and_the_users_variables(tmp_path, launcher):
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys\n"
        "names = 'OMP_NUM_THREADS', 'NUMBA_NUM_THREADS', 'HVD_SKETCH_TEST'\n"
        "rank = os.environ.get('HOROVOD_RANK') or os.environ['OMPI_COMM_WORLD_RANK']\n"
        "open(f'{sys.argv[1]}/{rank}', 'w').write(' '.join(os.environ[name] for name in names))\n"
    )
    status, output = run_command(
        [f"launch/{launcher}", "-n", "2", "--threads", "2", "--", sys.executable, str(job), str(tmp_path)],
        timeout_s=60,
        HVD_SKETCH_TEST="a b",
    )
    assert status == 0, output
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 2 a b"] * 2
