"""What using the CPU kernels does to the process around them: nothing that outlives a call but threads that wait."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.threads import _team, run_on_threads
from tests.support.harness import child_environment, run_command

# With one thread of torch's, calls on two threads run on threads of ours. torch's do not survive a fork: a child of
# a process that used them must not compute with torch.
TWO_THREADS = """
import os, sys, threading
import torch
torch.set_num_threads(2 if "torchs" in sys.argv else 1)
from hvd_sketch.kernels import cpu, threads
cpu.threads_for = lambda size: 2
assert threads._team.is_usable, "no OpenMP was found in torch"
assert threads._team.suits(2, torch.get_num_threads()) == ("torchs" in sys.argv)
torch.ones(1_000_000).sum()
values = torch.arange(1000.0)
def count():
    assert int(cpu.magnitude_histogram(values, 0, 21, 1024).sum()) == 999
count()
"""
FORK = """
def child_exits_with_0():
    child = os.fork()
    if child == 0:
        count()
        assert threading.active_count() == 2, "the child did not start a thread of its own"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
child_exits_with_0()
count()
for _ in range(5):
    child_exits_with_0()
    count()
"""
AT_EXIT = """
import atexit, os, threading

def look():  # registered first, called last
    if threading.active_count() > 1:
        print("left at the end:", threading.enumerate(), flush=True)
        os._exit(1)

atexit.register(look)
"""
WORKERS = """
import numba, numpy as np
from torch.utils.data import DataLoader, Dataset

@numba.njit(parallel=True)
def double(x):
    y = np.empty_like(x)
    for i in numba.prange(x.size):
        y[i] = 2 * x[i]
    return y

class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.from_numpy(double(np.full(32, i, dtype=np.float32)))

for epoch in range(2):
    batches = list(DataLoader(Data(), 2, num_workers=1, multiprocessing_context="fork", timeout=100))
    assert float(sum(batch.sum() for batch in batches)) == 2 * 32 * 6
    count()
"""
# A signal handler raises at some moment of most calls, in a kernel of Python code or in a compiled one.
INTERRUPTS = """
import random, signal, time
from hvd_sketch.hashing import BlockHash

def interrupt(number, frame):
    raise KeyboardInterrupt

def kernel(begun, ended, thread, threads):
    begun.append(thread)
    if threading.current_thread() is threading.main_thread():
        time.sleep(0.00005)  # lets a helper take the other index
    else:
        time.sleep(0.0002)  # a caller that does not wait is noticed
        ended.append(thread)

def call_python():
    begun, ended = [], []
    try:
        threads.run_on_threads(2, kernel, begun, ended)
        assert sorted(begun) == [0, 1], f"indices ran: {begun}"
    finally:
        calls.append((begun, ended, list(begun), list(ended)))

hash = BlockHash(300_000, 3, 20_000, 2)
gradient = torch.ones(hash.dim)
expected = torch.zeros(hash.table_shape)
cpu.feedback_accumulate_(hash, expected, None, torch.zeros(hash.dim), gradient, 0.0, 0)

def call_compiled():
    table, v = torch.zeros(hash.table_shape), torch.zeros(hash.dim)
    try:
        cpu.feedback_accumulate_(hash, table, None, v, gradient, 0.0, 0)
        assert torch.equal(table, expected)
    finally:
        calls.append((table, v, table.clone(), v.clone()))

def call_interrupted(call, after_s):
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return 0
    except KeyboardInterrupt:
        return 1

signal.signal(signal.SIGALRM, interrupt)
for call, count in (call_python, 2000), (call_compiled, 300):
    calls, started = [], time.perf_counter()
    for _ in range(20):
        call()
    mean_s = (time.perf_counter() - started) / 20
    interrupted = sum(call_interrupted(call, random.uniform(1e-6, 1.5 * mean_s)) for _ in range(count))
    assert 0 < interrupted < count, interrupted
    time.sleep(0.01)  # for helpers that come late
    for now, now_too, then, then_too in calls:
        if call is call_python:
            assert (now, now_too) == (then, then_too), "an index ran after its call"
            assert len(set(now)) == len(now), "an index ran twice"
        else:
            assert torch.equal(now, then) and torch.equal(now_too, then_too), "an index ran after its call"
"""
THREADS_STAY = """
import os, torch
from hvd_sketch.kernels import threads
torch.set_num_threads(8)
values = torch.ones(1_000_000)

def compute():
    for count in 2, 4, 5, 8, 12:
        ended = []
        threads.run_on_threads(count, lambda thread, threads: ended.append(thread))
        assert sorted(ended) == [*range(count)]
        assert values.sum() == 1_000_000

compute()
before = os.listdir("/proc/self/task")
for _ in range(20):
    compute()
    assert os.listdir("/proc/self/task") == before
"""
SIDE_EFFECTS = """
import os, random, signal, sys, threading, warnings
import numba, numpy as np, torch
torch.set_num_threads(3)

def state():
    return dict(
        signals={number: signal.getsignal(number) for number in signal.valid_signals()},
        torch_threads=torch.get_num_threads(), interop_threads=torch.get_num_interop_threads(),
        environment=dict(os.environ), warnings=list(warnings.filters),
        hooks=(sys.excepthook, threading.excepthook, sys.unraisablehook), streams=(sys.stdout, sys.stderr),
        random=random.getstate(), numpy=str(np.random.get_state()), torch=torch.get_rng_state().tolist(),
        flags=(torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
               torch.get_default_device(), torch.get_float32_matmul_precision()),
        switch_interval=sys.getswitchinterval(), recursion=sys.getrecursionlimit(), path=list(sys.path),
        folder=os.getcwd(), errors=np.geterr(),
    )

def same(before, after):
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, {name: (before[name], after[name]) for name in changed if name not in ("torch", "numpy")}

before = state()
import hvd_sketch, hvd_sketch.kernels.cpu
same(before, state())
gradient = torch.arange(600_000.0)
for options in (dict(momentum=0.9), dict(momentum=0.0), dict(momentum=0.0, candidates="heavymix")):
    config = hvd_sketch.SketchConfig.paper(cols=5000, k=300, **options)
    exchange = hvd_sketch.SketchedAllreduce(config, len(gradient), hvd_sketch.local_transports(1)[0])
    for _ in range(3):
        assert len(exchange.step(gradient).indices) == 300
same(before, state())
try:  # Numba's threads, which asking for their number would start
    sys.exit(f"Numba's threads were started: {numba.threading_layer()}")
except ValueError:
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
"""


def run_program(program: str, *arguments: str, timeout_s: float = 200) -> None:
    status, output = run_command([sys.executable, "-c", program, *arguments], timeout_s)
    assert (status, output) == (0, ""), output


@pytest.mark.parametrize("whose", ["ours", "torchs"])
def test_forked_children_use_kernels(whose: str) -> None:
    """A child has threads of ours in any case."""
    run_program(TWO_THREADS + FORK, whose)


def test_no_thread_of_ours_is_left_at_the_end() -> None:
    run_program(AT_EXIT + TWO_THREADS + "assert threading.active_count() == 2")


@pytest.mark.parametrize("whose", ["ours", "torchs"])
def test_signal_handlers_that_raise(whose: str) -> None:
    """A call returns what is right, or it raises and no thread of it is left."""
    run_program(TWO_THREADS + INTERRUPTS, whose)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_calls_end_no_thread_of_torchs_and_start_none_again() -> None:
    run_program(THREADS_STAY)


def test_forked_workers_use_numba_threads() -> None:
    run_program(TWO_THREADS + WORKERS)


def test_kernels_leave_the_process_as_it_was() -> None:
    """Nothing is written either."""
    run_program(SIDE_EFFECTS)


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_nothing_is_written_to_a_terminal(cache: str, tmp_path: Path) -> None:
    """The ranks of mpirun have one; colorama writes to no other stdout."""
    cold = {"NUMBA_CACHE_DIR": str(tmp_path)} if cache == "cold" else {}
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-c", TWO_THREADS]
        subprocess.run(command, env=child_environment() | cold, stdout=theirs, stderr=theirs, timeout=200, check=True)
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            assert os.read(ours, 1000) == b""
    finally:
        os.close(ours)
        os.close(theirs)


def results(hash: BlockHash, seed: int) -> list[Tensor]:
    values = torch.randn(hash.dim, generator=torch.Generator().manual_seed(seed))
    table, u, v = torch.zeros(hash.table_shape), torch.zeros(hash.dim), torch.zeros(hash.dim)
    cpu.feedback_accumulate_(hash, table, u, v, values, 0.9, 0)
    cpu.accumulate_(hash, table, values, 0)
    estimates = cpu.estimate(hash, table, 0, hash.dim)
    found = cpu.owned_above(hash, table[:, 0].contiguous(), 0, 0x3F800000, 3)
    chosen = cpu.select_above(estimates, 0x3F800000, 5)
    return [table, u, v, estimates, *found, chosen, cpu.magnitude_histogram(estimates, 0, 20, 2048)]


@pytest.fixture(params=["ours", "torchs"])
def run_on(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Have calls on a number of threads run on threads of ours, or on torch's."""
    before = torch.get_num_threads()

    def choose(threads: int) -> None:
        torch.set_num_threads(threads if request.param == "torchs" else 1)
        assert _team.suits(threads, torch.get_num_threads()) == (request.param == "torchs")

    yield choose
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 5])
def test_results_for_any_number_of_threads(
    threads: int, run_on: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(threads)
    hash = BlockHash(400_000, 3, 20_000, 2)  # several chunks
    monkeypatch.setattr(cpu, "threads_for", lambda size: 1)
    alone = results(hash, 0)
    monkeypatch.setattr(cpu, "threads_for", lambda size: threads)
    assert all(torch.equal(one, many) for one, many in zip(alone, results(hash, 0), strict=True))


def test_callers_in_several_threads(run_on: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(3)
    hash = BlockHash(200_000, 3, 10_000, 2)
    monkeypatch.setattr(cpu, "threads_for", lambda size: 3)
    alone = [results(hash, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(results, [hash] * 16, [*range(4)] * 4, timeout=100))
    for number, result in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(alone[number % 4], result, strict=True))


def test_what_a_kernel_raises_reaches_the_caller(run_on: Callable[[int], None]) -> None:
    run_on(4)
    begun = []

    def kernel(thread: int, threads: int) -> None:
        begun.append(thread)
        if thread == 2:
            raise MemoryError("index 2")

    with pytest.raises(MemoryError, match="index 2"):
        run_on_threads(4, kernel)
    assert {0, 1, 2} <= set(begun) and len(set(begun)) == len(begun)


def test_a_team_of_torchs_size_for_most_of_its_threads() -> None:
    sizes = [threads for threads in range(1, 20) if _team.suits(4, threads)]
    assert sizes == [4, 5, 6, 7]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ended: list[int] = []
    run_on_threads(500, lambda thread, threads: ended.append(thread))
    assert sorted(ended) == [*range(500)]
