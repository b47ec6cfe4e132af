"""After a warm-up nothing is compiled any more, and of several processes one compiles."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import ROOT, child_environment, run_command

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]  # what all use compiles every kernel

COMPILED = """
from numba.core import event
recorder = event.RecordingListener()
event.register("numba:compile", recorder)
def compiled():
    return [e.data["dispatcher"].py_func.__name__ for _, e in recorder.buffer if e.is_start]
"""
RUNS = """
from functools import partial
import torch
import hvd_sketch
from hvd_sketch.transport import run_local

def steps(transport, dim, k, options):
    config = hvd_sketch.SketchConfig.paper(cols=900, k=k, **options)
    exchange = hvd_sketch.SketchedAllreduce(config, dim, transport)
    random = torch.Generator().manual_seed(transport.rank)
    for _ in range(4):
        exchange.step(torch.randn(dim, generator=random) ** 3)

def training(transport):
    model = torch.nn.Linear(100, 50)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    options = dict(momentum=0.0, dense_below=1)
    config = hvd_sketch.SketchConfig.for_compression(10, hvd_sketch.sketched_dim(model.parameters()), **options)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = hvd_sketch.DistributedOptimizer(inner, model.named_parameters(), config, transport)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 100)).square().mean().backward()
        optimizer.step()

for ranks in (1, 3):
    for options in (dict(momentum=0.0), dict(momentum=0.9), dict(momentum=0.0, candidates="heavymix"),
                    dict(momentum=0.9, deterministic=True), dict(oversample=1, value_bits=4, table_bits=8),
                    dict(oversample=1, value_bits=16, candidates="nominate"),
                    dict(oversample=1, value_bits=8, candidates="random")):
        for dim, k in ((785, 10), (20_011, 97), (100_003, 1500)):
            run_local(ranks, partial(steps, dim=dim, k=k, options=options), 100)
    run_local(ranks, training, 100)
sketch = hvd_sketch.CountSketch(5000, 3, 500, shards=3)
sketch._kernels.accumulate_(sketch.hash, sketch.table, torch.ones(5000), 0, range(1, 2))
sketch.accumulate_(torch.ones(4000), 1000)
sketch.estimate(), sketch.top(10), sketch.heavymix(10, 0)
"""
WARM_UP = """
from hvd_sketch.warm_up import _compiled, cached_kernels, warm_up
told = []
warm_up(told.append)
"""
JOB = """
import sys, hvd_sketch, torch
from hvd_sketch.warm_up import _compiled
config = hvd_sketch.SketchConfig.paper(cols=90, k=9)
exchange = hvd_sketch.SketchedAllreduce(config, 999, hvd_sketch.MPITransport())
print("constructed", file=sys.stderr, flush=True)
exchange.step(torch.ones(999))
if _compiled():
    print("this rank compiled", flush=True)
"""
JOB_COMMAND = ["launch/mpirun.sh", "-n", "2", "--", sys.executable, "-c", JOB]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numba_cache")


@pytest.fixture(scope="module")
def outputs(folder: Path) -> tuple[str, str]:
    """Of a job of two ranks on an empty cache, and of a process that warms up while the job compiles."""
    settings: dict[str, Any] = {
        "env": child_environment() | {"NUMBA_CACHE_DIR": str(folder)},
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": ROOT,
    }
    with subprocess.Popen(["timeout", "300", *JOB_COMMAND], stdout=subprocess.PIPE, **settings) as job:
        assert job.stdout is not None
        begin = ""
        while "CPU kernels" not in begin and (line := job.stdout.readline()):
            begin += line
        meanwhile = [sys.executable, "-c", WARM_UP + "print(told, _compiled() > 0)"]
        other = subprocess.check_output(meanwhile, timeout=200, **settings)
        output = begin + job.stdout.read()
    assert job.returncode == 0, output
    return output, other


def run_program(program: str, folder: Path, timeout_s: float = 200) -> str:
    status, output = run_command([sys.executable, "-c", program], timeout_s, NUMBA_CACHE_DIR=str(folder))
    assert status == 0, output
    return output


def test_one_of_three_processes_compiles(outputs: tuple[str, str]) -> None:
    job, other = outputs
    assert job.count("this rank compiled") == 1, job
    assert "False" in other and (other.startswith("['waiting for another process") or other.startswith("[]"))


def test_a_job_on_an_empty_cache_says_once_that_it_compiles(outputs: tuple[str, str], folder: Path) -> None:
    """On rank 0 alone, before the first step, whichever rank it is that compiles."""
    job, _ = outputs
    told = [line for line in job.splitlines() if "CPU kernels" in line]
    assert len(told) == 1, job
    assert "compiling the CPU kernels, once after an installation: about" in told[0] or "waiting for" in told[0]
    assert job.index(told[0]) < job.index("constructed")
    status, output = run_command(JOB_COMMAND, 200, NUMBA_CACHE_DIR=str(folder))
    assert status == 0 and "CPU kernels" not in output and "compiled" not in output, output


def test_runs_compile_nothing_after_a_warm_up(folder: Path, outputs: tuple[str, str]) -> None:
    ours = (
        "assert not [name for name in compiled() if name in {k.py_func.__name__ for k in cached_kernels()}], compiled()"
    )
    run_program(COMPILED + WARM_UP + "assert not told, told\n" + RUNS + ours, folder)


def test_a_warm_cache_costs_nothing(folder: Path, outputs: tuple[str, str]) -> None:
    timed = "import time, hvd_sketch.warm_up\nbegin = time.perf_counter()\n" + WARM_UP
    assert float(run_program(timed + "print(time.perf_counter() - begin)", folder)) < 0.5


def test_a_lost_marker_compiles_nothing(folder: Path, outputs: tuple[str, str]) -> None:
    """Its kernels are still in the cache, whose own index says so."""
    for marker in folder.rglob("hvd_sketch_warm_*[!k]"):
        marker.unlink()
    run_program(COMPILED + WARM_UP + "assert not told and not compiled(), compiled()", folder)


def test_a_process_that_dies_lets_others_in(tmp_path: Path) -> None:
    lock = "from hvd_sketch.warm_up import _one_process\nfrom pathlib import Path\nimport sys, time\n"
    hold = lock + "with _one_process(Path(sys.argv[1]), print):\n    print('held', flush=True)\n    time.sleep(100)\n"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            time.sleep(0.1)
            first.kill()
            printed = [second.stdout.readline(), ""]
            if "waiting" in printed[0]:
                printed[1] = second.stdout.readline()
            second.kill()
    assert "held\n" in printed
