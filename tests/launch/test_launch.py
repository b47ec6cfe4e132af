"""The launch scripts: their command lines, and what they refuse."""

from __future__ import annotations

import pytest

from tests.launch.conftest import VENV
from tests.support.harness import ROOT

THREADS = "-x OMP_NUM_THREADS={0} -x NUMBA_NUM_THREADS={0} -x MKL_NUM_THREADS={0}"
THREADS_ENV = "env OMP_NUM_THREADS={0} NUMBA_NUM_THREADS={0} MKL_NUM_THREADS={0}"
LAUNCH_SCRIPTS = ["setup.sh", "test.sh", "quickstart.sh", "docs.sh", "torchrun.sh", "mpirun.sh", "horovodrun.sh"]
EAGER = "--mca btl_tcp_eager_limit 2097152 --mca btl_tcp_rndv_eager_limit 2097152"
PREFIX = f"--prefix {VENV}"
TCP = f"--mca oob_tcp_if_include eth0 --mca btl_tcp_flags send\\,inplace --mca btl_tcp_sndbuf 131072 {EAGER}"
YIELD = "--mca mpi_yield_when_idle 1"
SOCKETS = "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
FORWARDED = "-x PATH -x OPAL_PREFIX -x HVD_SKETCH_VENV -x MALLOC_MMAP_THRESHOLD_ -x MALLOC_TRIM_THRESHOLD_"


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
    "arguments, expected",
    [
        (
            "-n 3 -- python train.py",
            f"{THREADS_ENV.format(2)} torchrun --standalone --nproc-per-node 3 --no-python python train.py",
        ),
        (
            "-n 9 --interface eth0 ls",
            f"{THREADS_ENV.format(1)} {SOCKETS} torchrun --standalone --nproc-per-node 9 --no-python ls",
        ),
    ],
)
def test_torchrun_command_line(bare, arguments, expected):
    status, output = bare("launch/torchrun.sh", "--dry-run", *arguments.split())
    assert (status, without_notes(output)) == (0, expected + "\n")


@pytest.mark.parametrize(("ranks", "slots"), [(6, [2, 4]), (5, [2, 3]), (2, [2])])
def test_torchrun_has_a_command_line_for_each_host(bare, hosts, ranks, slots):
    asked = ["--hosts", hosts, "-n", str(ranks), "--interface", "eth0", "--threads", "3", "ls", "a b"]
    status, output = bare("launch/torchrun.sh", "--dry-run", *asked, HVD_SKETCH_A="x y", OTHER="1")
    assert status == 0
    assert len(output.splitlines()) == len(slots)
    for place, line in enumerate(output.splitlines()):
        assert line.startswith(f"node{place + 1}: env PATH=") and " HVD_SKETCH_A=x\\ y " in line and "OTHER" not in line
        assert line.endswith(
            f" OMP_NUM_THREADS=3 NUMBA_NUM_THREADS=3 MKL_NUM_THREADS=3 {SOCKETS} torchrun --nnodes {len(slots)} "
            f"--node-rank {place} --nproc-per-node {slots[place]} --master-addr node1 --master-port 29500 "
            "--no-python ls a\\ b"
        )


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
        "-x MALLOC_MMAP_THRESHOLD_ -x MALLOC_TRIM_THRESHOLD_ "
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
        ("--launcher torchrun", "launch/torchrun.sh -n 4 {module} --transport torch"),
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


@pytest.mark.parametrize("name", ["torchrun.sh", "mpirun.sh", "horovodrun.sh"])
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
        ("--hosts . ls", "cannot read '.'"),
        ("--hosts {windows} ls", "line 1 ends as in Windows"),
        ("--hosts {twice} ls", "line 2: 'node1' stands there twice"),
        ("--hosts {ipv6} ls", "line 1: expected a name or an IPv4 address, got '[::1]'"),
        ("--hosts {hosts} -n 7 ls", "7 ranks asked for, but {hosts} has 6 slots"),
    ],
)
def test_bad_use_exits_with_2_and_says_why(bare, tmp_path, hosts, name, arguments, message):
    contents = {
        "empty": b"\n# nothing\n",
        "wrong": b"node1 slots=1\nnode2 slots=none\n",
        "windows": b"node1 slots=1\r\n",
        "twice": b"node1 slots=1\nnode1 slots=2\n",
        "ipv6": b"[::1] slots=1\n",
    }
    files = {"hosts": hosts} | {name: str(tmp_path / name) for name in contents}
    for name_of_file, content in contents.items():
        (tmp_path / name_of_file).write_bytes(content)
    status, output = bare(f"launch/{name}", "--dry-run", *arguments.format(**files).split())
    assert status == 2
    assert message.format(**files) in output
    assert output.startswith(f"launch/{name}: ") and output.count("\n") == 1


@pytest.mark.parametrize(
    "command, message",
    [
        ("mpirun.sh --gloo -n 2 ls", "unknown option --gloo"),
        ("quickstart.sh --launcher srun", "mpirun, torchrun or horovodrun, got 'srun'"),
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
