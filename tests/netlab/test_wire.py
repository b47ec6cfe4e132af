"""The ledger is true: what it models, phase by phase, is what the interfaces of the hosts really sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.harness import launch
from tests.support.labs import lab, needs_lab

pytestmark = [pytest.mark.slow, needs_lab]

HEADER_BYTES = 14 + 20 + 32  # Ethernet, IPv4, and TCP with its timestamps
LARGE_BYTES = 10**6
TOLERANCE = 0.03
# Over so many steps these phases send more than LARGE_BYTES in each world.
DIM, STEPS = 3_000_000, {"sketched": 3, "ordered": 1, "dense": 1}
CONFIG = {"cols": 200_000, "k": 260_000, "oversample": 4, "momentum": 0.0}
FEW_BITS = {"table_bits": 4, "value_bits": 4, "oversample": 1}
PHASES = {
    *(f"sketched {phase}" for phase in ("sketch", "indices", "exact", "values")),
    *(f"ordered {phase}" for phase in ("sketch", "exact", "values")),
    "dense dense",
}
# Horovod's background thread talks in every cycle (1 ms) in which it has nothing else to do. That cannot be told apart
# from a phase's own bytes, so let it talk less: with 1 ms the idle traffic is up to 5 % of a phase, or none.
QUIET_CYCLE_MS = "20"


@pytest.fixture(scope="module")
def hosts() -> Iterator[str]:
    with lab(4) as name:
        yield name


@dataclass
class Phase:
    """Sums over the hosts, in bytes: what the ledger says, what the interfaces sent, and what of it was not ours."""

    name: str
    modelled: float
    sent: float
    headers: float
    idle: float

    @property
    def ratio(self) -> float:
        return (self.sent - self.headers - self.idle) / self.modelled

    def __str__(self) -> str:
        return (
            f"{self.name:20} ledger {self.modelled:12,.0f}   interfaces {self.sent:12,.0f}, of which headers "
            f"{self.headers:9,.0f} and idle {self.idle:9,.0f}   ratio {self.ratio:.4f}"
        )


def sum_over_hosts(results: list[dict[str, Any]]) -> list[Phase]:
    phases = []
    for name in results[0]["modelled"]:
        total = Phase(name, 0, 0, 0, 0)
        for result in results:
            idle_bytes, idle_packets, idle_s = result["weighed"]["idle"]
            sent, packets, elapsed_s = result["weighed"][name]
            total.modelled += result["modelled"][name]
            total.sent += sent
            total.headers += HEADER_BYTES * packets
            total.idle += (idle_bytes - HEADER_BYTES * idle_packets) * elapsed_s / idle_s
        phases.append(total)
    return phases


WORLDS = [(kind, ranks, False) for kind in ("torch", "mpi", "horovod-gloo") for ranks in (2, 4)]
GRIDS = [("mpi", 4, True), ("torch", 4, True)]  # with few bits: they travel in the alltoalls that a grid carries twice


@pytest.mark.daily
@pytest.mark.parametrize(("kind", "ranks", "grid"), [*WORLDS, ("mpi", 3, False), ("horovod-mpi", 3, False), *GRIDS])
def test_ledger_is_what_the_interfaces_sent(monkeypatch, hosts: str, kind: str, ranks: int, grid: bool) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", QUIET_CYCLE_MS)
    how = {
        "dim": DIM,
        "config": CONFIG | (FEW_BITS if grid else {}),
        "steps": STEPS | ({"ordered": 3} if grid else {}),
        "grid": grid,
    }
    results = launch(kind, ranks, "tests.support.wire:weigh_exchanges", 240, hosts, **how)
    carrier = {"mpi": "MPITransport", "horovod-mpi": "MPIUnderHorovod"}.get(kind, "TorchTransport")
    assert {(result["size"], result["carrier"]) for result in results} == {(ranks, carrier)}
    phases = sum_over_hosts(results)
    large = [phase for phase in phases if phase.modelled >= LARGE_BYTES]
    small = [phase for phase in phases if phase.modelled < LARGE_BYTES]
    print(f"\n{kind}, {ranks} hosts", *large, "small phases, not judged:", *small, sep="\n")
    assert {phase.name for phase in large} >= PHASES
    wrong = [str(phase) for phase in large if abs(phase.ratio - 1) > TOLERANCE]
    assert not wrong, "\n".join(["the ledger does not say what was sent:", *wrong])
