"""What a step sends and keeps by the plan's figures is what the ledger counts."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from benchmarks.methods import LibraryAllreduce, PowerSGD
from hvd_sketch import DistributedOptimizer, LowRankAllreduce, SketchConfig, wire_bytes
from hvd_sketch.at_ratio import bytes_of, configurations, kept_bytes
from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.cost import Network, Workload, methods
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.measured_costs import CARRIERS
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import LocalTransport, run_local

LIMIT_S = 60
RANKS = 4
SHAPES = [(200, 300), (400, 250), (64, 32, 3, 3)]
DIM = sum(map(prod, SHAPES))
GIGABIT = Network(RANKS, 1e9 / 8, 50e-6, CARRIERS["mpi"])


def stepped(exchange: Exchange, transport: LocalTransport, steps: int = 5) -> tuple[float, float, float]:
    """Bytes sent per step, collectives of the last one, and bytes kept."""
    random = torch.Generator().manual_seed(transport.rank)
    for _ in range(steps):
        exchange.step(torch.randn(DIM, generator=random).pow_(3))
    kept = sum(tensor.nbytes for tensor in exchange.state_dict().values() if isinstance(tensor, torch.Tensor))
    kept += exchange._memory.nbytes if isinstance(exchange, LowRankAllreduce) else 0
    collectives = sum(record.step == steps - 1 for record in exchange.ledger.records)
    return exchange.ledger.totals().wire_bytes / steps, collectives, kept


@pytest.mark.parametrize(
    ("name", "bits", "ratio"),
    [
        *((name, 4, 50) for name in ("lowrank", "nominate", "random", "sketch", "heavymix", "paper")),
        *(("lowrank", 8, 50), ("nominate", 32, 50), ("random", 32, 50), ("sketch", 8, 50), ("heavymix", 4, 400)),
        ("paper", 32, 1.2),  # its rows travel one by one
    ],
)
def test_ours_are_what_the_ledger_counts(name: str, bits: int, ratio: float) -> None:
    config = configurations(SHAPES, ratio, RANKS, bits)[name]
    assert config.value_bits == (bits if name != "paper" else 32)

    def main(transport: LocalTransport) -> tuple[float, float, float]:
        exchange = make_exchange(config, DIM, transport, torch.device("cpu"), shapes=SHAPES)
        return stepped(exchange, transport)

    planned = methods(Workload(SHAPES, ratio, bits=bits), GIGABIT)[name]
    for sent, collectives, kept in run_local(RANKS, main, LIMIT_S):
        assert planned.sent_bytes == pytest.approx(sent, rel=0.08)
        assert planned.collectives == collectives
        table = 4 * config.rows * config.cols if isinstance(config, SketchConfig) and config.has_table else 0
        assert planned.kept_bytes == kept_bytes(config, SHAPES) == pytest.approx(kept + table, rel=0.02)
    assert bytes_of(config, SHAPES, RANKS) == pytest.approx(8 * DIM / ratio, rel=0.05)


def test_without_a_grid_nothing_goes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, ranks, ratio = shapes_of_size(1_000_000), 36, 150
    alone, grid = (
        methods(Workload(shapes, ratio), Network(ranks, 1e9 / 8, 50e-6, CARRIERS[carrier]))
        for carrier in ("horovod-own", "mpi")
    )
    twice = [bytes_of(method.config, shapes, ranks) for method in alone.values() if method.config is not None]
    monkeypatch.setattr(wire_bytes, "is_grid", lambda ranks: False)
    once = {name: method for name, method in alone.items() if method.config is not None}
    for (name, method), in_grid in zip(once.items(), twice, strict=True):
        sent = bytes_of(method.config, shapes, ranks)
        assert method.sent_bytes == pytest.approx(sent * 35 / 36), name
        assert sent == pytest.approx(8e6 / ratio, rel=0.01) and sent <= in_grid, name
    assert sum(method.config != grid[name].config for name, method in once.items()) >= 4


def test_a_gpu_keeps_no_update_of_low_rank() -> None:
    on_cpu, on_gpu = (
        methods(Workload(SHAPES, 50, device=device), GIGABIT)["lowrank"].kept_bytes for device in ("cpu", "cuda")
    )
    assert on_cpu - on_gpu == 4 * DIM


@pytest.mark.parametrize("name", ["lowrank", "nominate", "random", "sketch"])
@pytest.mark.parametrize("columns", [10, 400])
def test_small_tensors_are_counted_where_they_travel(name: str, columns: int) -> None:
    """Beside single coordinates they go dense, here together more bytes than all that is compressed."""

    def make() -> torch.nn.Module:
        tied = [torch.nn.Parameter(torch.zeros(60, 15)) for _ in range(columns)]
        return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(300, 200)), *tied])

    shapes, small = [(300, 200)], [(60, 15)] * columns
    planned = methods(Workload(shapes, 30, small=small), GIGABIT)[name]

    def main(transport: LocalTransport) -> Any:
        parameters = make()
        inner = torch.optim.SGD(parameters.parameters(), lr=0.0)
        optimizer = DistributedOptimizer(inner, parameters.named_parameters(), planned.config, transport)
        random = torch.Generator().manual_seed(transport.rank)
        for _ in range(4):
            for parameter in parameters.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random).pow_(3)
            optimizer.step()
        return optimizer.ledger.totals()

    totals = run_local(RANKS, main, LIMIT_S)[0]
    assert totals.wire_bytes / 4 == pytest.approx(planned.sent_bytes, rel=0.08)
    assert abs(totals.collectives / 4 - planned.collectives) <= 1


@pytest.mark.parametrize(("name", "kind"), [("dense", LibraryAllreduce), ("powersgd", PowerSGD)])
def test_peers_are_what_the_ledger_counts(name: str, kind: type[Exchange]) -> None:
    parameters = [(f"matrix {number}", shape, "float32") for number, shape in enumerate(SHAPES)]

    def main(transport: LocalTransport) -> float:
        return stepped(kind(None, DIM, transport, parameters=parameters), transport)[0]

    planned = methods(Workload(SHAPES, 50), GIGABIT)[name]
    assert run_local(RANKS, main, LIMIT_S)[0] == pytest.approx(planned.sent_bytes, rel=0.01)
