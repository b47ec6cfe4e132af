"""``hvd-sketch plan --measure`` finds the rate of a network that is known."""

from __future__ import annotations

import pytest

from tests.support.harness import launch
from tests.support.labs import lab, needs_lab

RATE = 100e6  # bit/s

pytestmark = [pytest.mark.slow, needs_lab]


def test_links_and_job_have_the_rate_of_the_network() -> None:
    with lab(3, "--rate", "100mbit") as name:
        first, *others = launch("torch", 3, "tests.support.plan_targets:measured", lab=name)
    assert all(other["links"] == first["links"] for other in others)
    assert sorted(first["links"]) == [(0, 1), (0, 2), (1, 2)]
    for rate in (*first["links"].values(), first["job"]):
        assert 0.75 * RATE < rate <= 1.05 * RATE, first
