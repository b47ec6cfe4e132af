"""The short form of ``python -m benchmarks.soak``: nothing grows over a thousand steps."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest

from benchmarks.soak import SAMPLES, Sample, faults_of, row, soak
from tests.support.harness import LAUNCHERS, run_command

SOAK = [sys.executable, "-m", "benchmarks.soak"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["mpi", "horovod-gloo"])
def test_memory_and_descriptors_stay(kind: str) -> None:
    """In so few steps one new piece of an allocator's memory, of nearly 1 MB, looks like growth."""
    limited = [*SOAK, "--steps", "1000", "--limit-mb", "2"]
    status, output = run_command([*LAUNCHERS[kind], "-n", "2", "--", *limited], timeout_s=500)
    assert status == 0, output
    assert output.count("| 1000 | ") == 2, output


def test_what_grows_is_named(tmp_path: Path) -> None:
    """Memory, descriptors and threads of this process."""
    kept: list[object] = []
    numbers = count()

    def step() -> None:
        kept.append(bytearray(400_000))
        kept.append((tmp_path / str(next(numbers))).open("w"))

    samples, traced = soak(step, SAMPLES, rank=3, trace=True)
    memory, descriptors = faults_of(samples, limit_mb=1.0)
    assert "resident memory grew by 4." in memory and "between steps 10 and 20" in memory
    assert "descriptors after step 10" in descriptors
    assert any("test_soak.py" in line for line in traced)
    assert row(samples, 3).startswith("| 3 | 20 | ") and "+4." in row(samples, 3)


def test_what_stays_is_no_fault() -> None:
    samples = [Sample(step, {"[heap]": 10**8 + step}, 20, 4, 0.01) for step in range(SAMPLES)]
    assert faults_of(samples, 1.0) == []
