"""plan_check says how far predictions are from measurements, and where advice is wrong: on records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.network import plan_check
from hvd_sketch.measured_costs import CARRIERS

DIM = 1_000_000
PROBE = {"collective_s": 1e-6, "bytes_per_s": 1e9, "local_s": None}


def record(method: str, seconds: float, rate: str = "100mbit", **others: Any) -> dict[str, Any]:
    about = {"method": method, "transport": "mpi", "dim": DIM, "hosts": 2, "rate": rate, "cores": 2}
    probe = {**PROBE, "local_s": 0.003} if method in ("nominate150", "lowrank150") else PROBE
    return about | {"seconds": {"median": seconds}, "probe": probe} | others


def test_a_prediction_is_bytes_over_the_rate_and_the_local_work() -> None:
    (dense, fast, ours) = plan_check.compared(
        [record("allreduce", 0.32), record("allreduce", 0.004, "none"), record("nominate150", 0.004)]
    )
    assert dense["predicted_s"] == pytest.approx(4e6 / 12.5e6 + 0.4e-9 * DIM - plan_check.BURST_S, rel=1e-3)
    assert fast["predicted_s"] == pytest.approx(4e6 / 1e9 + 0.4e-9 * DIM, rel=1e-3), "what the transport moves"
    bytes_s = 8 * DIM / 150 / 2 / 12.5e6
    assert ours["predicted_s"] == pytest.approx(0.003 + bytes_s - plan_check.BURST_S, rel=0.01)
    assert plan_check.is_close(dense) and plan_check.is_close(fast)
    assert not plan_check.is_close(plan_check.compared([record("allreduce", 0.5)])[0])


def test_a_small_message_wakes_what_sleeps_and_costs_each_rank_one_for_every_other() -> None:
    probe = {**PROBE, "collective_s": 3e-3, "local_s": 0.003}
    (ours,) = plan_check.compared([record("nominate150", 1, "none", transport="torch", hosts=4, probe=probe)])
    waits = 3 * (3e-3 + CARRIERS["torch"].wake_s)
    assert ours["predicted_s"] == pytest.approx(0.003 + waits, rel=0.01)


def test_what_every_collective_takes_is_not_taken_for_a_message() -> None:
    probe = {**PROBE, "collective_s": 4e-3, "local_s": 0.003}
    (ours,) = plan_check.compared([record("nominate150", 1, "none", transport="horovod-own", hosts=4, probe=probe)])
    assert ours["predicted_s"] == pytest.approx(0.003 + 3 * 4e-3, rel=0.01)


def test_of_many_probes_the_median_counts() -> None:
    probes = [{**PROBE, "bytes_per_s": rate} for rate in (1e6, 1e9, 1e12)]
    known = plan_check.compared([record("allreduce", 1, "none", probe=probe) for probe in probes])
    assert len({each["predicted_s"] for each in known}) == 1
    assert known[0]["predicted_s"] == pytest.approx(4.4e-3, rel=1e-2)


def test_advice_is_right_where_what_it_names_is_not_much_slower_than_the_fastest() -> None:
    def slow(nominate_s: float, dense_s: float) -> list[dict[str, Any]]:
        return [record("allreduce", dense_s), record("nominate150", nominate_s)]

    right, near, wrong = (plan_check.advice_of(plan_check.compared(slow(*each))) for each in ((1, 9), (5, 4.5), (9, 1)))
    assert right == {"advised": "nominate", "fastest": "nominate", "longer": 1.0, "right": True}
    assert near and near["fastest"] == "dense" and near["right"]
    assert wrong == {"advised": "nominate", "fastest": "dense", "longer": 9.0, "right": False}
    alone = plan_check.compared(slow(1, 9)[:1])
    assert plan_check.advice_of(alone) is None


def test_the_report_counts() -> None:
    records = [
        *(record("allreduce", 0.32), record("nominate150", 0.004)),
        *(record("allreduce", 0.001, "1gbit"), record("nominate150", 9.0, "1gbit")),
        record("sketch20", 1.0),
        {name: value for name, value in record("powersgd", 1.0).items() if name != "probe"},
    ]
    lines = plan_check.report(records).splitlines()
    assert lines[-3:] == [
        "|---|---|---|---|---|",
        "| mpi | 2 | 2 of 4 | 1 | 1 of 2 |",
        "| all | | 2 of 4 | 1 | 1 of 2 |",
    ]
    assert "| mpi | 2 | 1,000,000 | 1gbit | nominate | dense | 9000.00 | no |" in lines
