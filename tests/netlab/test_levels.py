"""levels=2 on two hosts of two ranks each: hosts are found by themselves, and send what one rank of each would."""

from __future__ import annotations

import pytest

from tests.support.harness import launch
from tests.support.labs import lab, needs_lab

pytestmark = [pytest.mark.slow, needs_lab]

HEADER_BYTES = 14 + 20 + 32  # Ethernet, IPv4, and TCP with its timestamps


def test_a_host_sends_what_its_first_rank_says() -> None:
    with lab(2, "--slots", "2") as name:
        results = launch("torch", 4, "tests.support.levels_targets:weighs", 120, name)
    assert results[0]["host"] == results[1]["host"] != results[2]["host"] == results[3]["host"]
    for first, second in (results[:2], results[2:]):
        for levels in ("1", "2"):
            sent, packets = first[levels]["sent"]
            modelled = first[levels]["modelled"] + second[levels]["modelled"]
            # With one level two of the three ranks that a rank sends to are on the other host.
            expected = modelled if levels == "2" else modelled * 2 / 3
            assert abs((sent - HEADER_BYTES * packets) / expected - 1) < 0.03, (levels, first, second)
        assert second["2"]["modelled"] == 0
        assert first["2"]["sent"][0] < 0.55 * first["1"]["sent"][0]
