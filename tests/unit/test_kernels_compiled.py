"""What Numba makes of the kernels: one cache for processes that start at once, and no index out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import ROOT

BOUNDS_CHECKED = "equal or equals or full_size or chunks or nothing_to_do"
LANES_OUT_OF_BOUNDS = """
import numba, numpy as np
from hvd_sketch.kernels import _cpu_loops as loops
@numba.njit
def add(table, cell):
    loops._add_signed(table, cell, np.ones(16, dtype=np.float32), 0, np.uint32(0))
add(np.zeros(20, dtype=np.float32), 4)
for cell in (-1, 5):
    try:
        add(np.zeros(20, dtype=np.float32), cell)
    except IndexError:
        continue
    raise AssertionError(f"16 lanes from {cell} on are not within 20 elements")
"""


def test_processes_that_start_at_once_share_a_cold_cache(tmp_path: Any) -> None:
    program = (
        "import torch\n"
        "torch.set_num_threads(3)\n"
        "from hvd_sketch.kernels import _cpu_loops, cpu\n"
        "names = 'accumulate', 'feedback_accumulate', 'estimate', 'owned_above', 'histogram', 'select_above'\n"
        "assert not any(getattr(_cpu_loops, name).signatures for name in names), 'compiled at import'\n"
        "assert int(cpu.magnitude_histogram(torch.ones(1000), 0, 21, 1024).sum()) == 1000\n"
        "assert len(_cpu_loops.histogram.signatures) == 1\n"
        "assert torch.get_num_threads() == 3, 'Numba changed the threads of torch'\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert any(path.suffix == ".nbc" for path in tmp_path.rglob("*"))


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Any) -> None:
    """The tests against the reference once more, every index of the compiled loops checked, and 16 lanes at a time.

    Most of the time is compilation, of kernels that differ: two processes at once, which share a cache.
    """
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    pytest_run, folder = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"], ROOT / "tests/unit"
    programs: list[list[str | Path]] = [
        [*pytest_run, folder / "test_kernels.py", "-k", BOUNDS_CHECKED],
        [*pytest_run, folder / "test_kernels_selection.py", folder / "test_coding.py", "-k", "not device"],
        ["-c", LANES_OUT_OF_BOUNDS],
    ]

    def run(program: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=600)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, programs):
            assert done.returncode == 0, done.stdout + done.stderr
