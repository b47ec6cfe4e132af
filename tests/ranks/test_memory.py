"""What a training by coordinates of a residual that forgets takes beside model, gradients and inner optimizer."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.harness import run_command


@pytest.mark.multiprocess
def test_random_coordinates_into_a_sign_step_hold_four_bytes_per_parameter() -> None:
    """8 million parameters, an eighth of them updated in each step. In a process of its own: it is resident memory."""
    status, output = run_command([sys.executable, "-m", "tests.support.memory_main"], timeout_s=120)
    assert status == 0, output
    found = json.loads(output.splitlines()[-1])
    assert 3.9 < found["held"] < 4.4, found
    assert found["in_a_step"] < 36 * found["updated"], found  # 27 to 31; whole vectors of draws took 58 more
