"""The short form of ``python -m benchmarks.soak``: nothing grows over a thousand steps."""

from __future__ import annotations

import re
import sys
from itertools import count
from pathlib import Path

import pytest

from benchmarks.soak import SAMPLES, Sample, faults_of, row, soak
from tests.support.harness import LAUNCHERS, run_command

SOAK = [sys.executable, "-m", "benchmarks.soak"]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.parametrize("kind", ["mpi", "torch", "horovod-gloo"])
def test_memory_and_descriptors_stay(kind: str) -> None:
    """In so few steps one new piece of an allocator's memory looks like growth, and other jobs slow down."""
    limited = [*SOAK, "--steps", "1000", "--limit-mb", "2", "--limit-percent", "400"]
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
    memory, descriptors = faults_of(samples, limit_mb=1.0, limit_percent=float("inf"))
    grown = re.fullmatch(r"resident memory grew by (\S+) MB between steps 10 and 20", memory)
    assert grown and 3.9 < float(grown[1]) < 8  # MB: ten times 0.4, and what else this process allocates
    assert re.fullmatch(r"(\d+) and then (\d+) descriptors between steps 10 and 20", descriptors)
    assert any("test_soak.py" in line for line in traced)
    assert row(samples, 3).startswith("| 3 | 20 | ") and re.search(r" \+\d", row(samples, 3))


def test_what_stays_is_no_fault() -> None:
    samples = [Sample(step, {"[heap]": 10**8 + step}, 20, 4, 0.01) for step in range(SAMPLES)]
    assert faults_of(samples, 1.0, 5.0) == []


def test_fewer_descriptors_and_slower_steps_are_faults_of_the_last_half_only() -> None:
    samples = [Sample(step, {}, 20 - (step >= 15), 4, 0.0100 + 0.0006 * (step >= 15)) for step in range(SAMPLES)]
    descriptors, slower = faults_of(samples, 1.0, 5.0)
    assert descriptors == "20 and then 19 descriptors between steps 9 and 19"
    assert slower == "a step took 10.000 ms and then 10.600 ms, between steps 9 and 19: +6.0%"
    descriptors = [20 - (step == 3) + (step == 17) for step in range(SAMPLES)]
    once = [Sample(step, {}, descriptors[step], 4, 0.01 * (1 + 9 * (step in (2, 12)))) for step in range(SAMPLES)]
    assert faults_of(once, 1.0, 5.0) == []
