"""``hvd-sketch plan --measure``: every two hosts meet once, and a job plans from what it has measured."""

from __future__ import annotations

import json
import sys
from itertools import combinations

import pytest

from hvd_sketch.commands.measure import Link, links_of, rounds_of
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.harness import LAUNCHERS, run_command

LIMIT_S = 120
VARIABLES = {"torch": "RANK", "mpi": "OMPI_COMM_WORLD_RANK"}  # that tell ranks apart, as if each had its own host


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_all_pairs_meet_once_in_the_fewest_rounds(count: int) -> None:
    rounds = rounds_of(count)
    assert len(rounds) == count - 1 + count % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    for pairs in rounds:
        assert len({player for pair in pairs for player in pair}) == 2 * len(pairs)


def test_links_are_those_of_the_first_ranks_of_hosts() -> None:
    def main(transport: LocalTransport) -> list[Link]:
        return links_of(transport, "AABCB"[transport.rank])

    results = run_local(5, main, LIMIT_S)
    assert all(links == results[0] for links in results), "all ranks know all links"
    assert sorted(link.ranks for link in results[0]) == [(0, 2), (0, 3), (2, 3)]
    rates = [link.bytes_per_s for link in results[0]]
    assert rates == sorted(rates) and rates[0] > 0 and all(link.latency_s > 0 for link in results[0])
    assert run_local(2, lambda transport: links_of(transport, "A"), LIMIT_S) == [[], []]


@pytest.mark.parametrize("launcher", VARIABLES)
def test_a_job_plans_from_what_it_measures(launcher: str) -> None:
    plan = (
        f"HVD_SKETCH_HOST=${VARIABLES[launcher]} exec {sys.executable} -m hvd_sketch plan --params 2e5 --measure --json"
    )
    status, output = run_command([*LAUNCHERS[launcher], "-n", "2", "--", "bash", "-c", plan], LIMIT_S)
    assert status == 0, output
    record = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert (record["ranks"], record["coordinates"]) == (2, 200_000)
    assert [link["ranks"] for link in record["links"]] == [[0, 1]]
    measured = record["measured_bits_per_s"]
    assert 1e6 < measured < 1e12 and 1e-7 < record["measured_message_s"] < 1
    dense = record["methods"]["dense"]
    messages_s = dense["messages"] * record["measured_message_s"]
    assert dense["exchange_s"] - dense["local_s"] == pytest.approx(8 * dense["sent_bytes"] / measured + messages_s)
    assert "It pays " in record["advice"] or "PowerSGD" in record["advice"]
