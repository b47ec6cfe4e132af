"""Competitors and departures from the paper's algorithm do what they name, in a simulation of all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods.top_k import CountedTopK, TrueTopK
from benchmarks.paper.model_exchange import SimulatedModelExchange
from benchmarks.paper.variants import Variant, VariantAllreduce
from hvd_sketch import Simulation, SketchConfig
from hvd_sketch.model.routes import MakeExchange

DIM, WORKERS = 1013, 4
CONFIG = SketchConfig.paper(rows=3, cols=150, k=50, momentum=0.9, dense_below=0)


def gradients(step: int, workers: int) -> Tensor:
    """Heavy-tailed, float32 [workers, DIM]."""
    draw = np.random.default_rng([4, step])
    return torch.from_numpy((draw.standard_normal((workers, DIM)) ** 3).astype(np.float32))


def simulation_of(make: MakeExchange, config: SketchConfig = CONFIG, workers: int = WORKERS) -> Simulation:
    return Simulation([("w", nn.Parameter(torch.zeros(DIM)))], config, workers, make)


def updates_of(simulation: Simulation, steps: int) -> list[Tensor]:
    """Float32 [DIM] of each step."""
    ((_, parameter),) = simulation._named
    updates = []
    for step in range(steps):
        for rank, gradient in enumerate(gradients(step, simulation.ranks)):
            parameter.grad = gradient.clone()
            simulation.accumulate(rank)
        simulation.agree()
        updates.append(parameter.grad.clone())
    return updates


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", [TrueTopK, CountedTopK])
def test_top_k_without_a_sketch(method: MakeExchange, momentum: float) -> None:
    """The same written out with torch.topk."""
    config = SketchConfig.paper(cols=4, k=50, momentum=momentum, dense_below=0)
    simulation = simulation_of(method, config)
    u, v = torch.zeros(2, WORKERS, DIM)
    for step, update in enumerate(updates_of(simulation, 2)):
        u = u * momentum + gradients(step, WORKERS)
        v = v + u
        sent = torch.zeros_like(v, dtype=torch.bool)
        if method is TrueTopK:
            sent[:, v.sum(0).abs().topk(config.k).indices] = True
        else:
            sent.scatter_(1, v.abs().topk(config.k).indices, True)
        torch.testing.assert_close(update, (v * sent).sum(0) / WORKERS)
        u, v = u * ~sent, v * ~sent
    exact = sum(record.payload_bytes for record in simulation.ledger.records if record.phase == "local")
    assert exact == 0 and simulation.ledger.paper_compression_ratio() > 1


def test_without_masking_u_goes_on_where_v_was_sent() -> None:
    simulation = simulation_of(partial(VariantAllreduce, Variant(masking=False)), workers=1)
    (update,) = updates_of(simulation, 1)
    (exchange,) = simulation._exchanges[0]
    sent = update.nonzero().flatten()
    assert not exchange.residual[sent].any() and exchange.velocity[sent].all()


def sketch_bytes(values: dict[int, float], table_dtype: Any) -> tuple[list[int], int]:
    """What one worker with k = P = 1 sends of a gradient, and the bytes of its table."""
    config = SketchConfig.paper(rows=3, cols=400, k=1, oversample=1, momentum=0.0, dense_below=0)
    simulation = simulation_of(partial(VariantAllreduce, Variant(table_dtype=table_dtype)), config, 1)
    simulation.ledger.records = type(simulation.ledger.records)()
    ((_, parameter),) = simulation._named
    parameter.grad = torch.zeros(DIM).index_copy_(0, torch.tensor(list(values)), torch.tensor(list(values.values())))
    simulation.accumulate(0)
    simulation.agree()
    table = sum(record.payload_bytes for record in simulation.ledger.records if record.phase == "sketch")
    return parameter.grad.nonzero().flatten().tolist(), table


def test_tables_are_rounded_and_half_as_large() -> None:
    """1e-9 is 0 in float16, and zeros are not sent."""
    (whole, whole_bytes), (rounded, rounded_bytes) = (sketch_bytes({5: 1e-9}, t) for t in ("float32", "bfloat16"))
    assert whole == rounded == [5] and whole_bytes == 2 * rounded_bytes > 0
    assert sketch_bytes({5: 1e-9}, "float16")[0] == []


def test_dense_sends_all_tensors_dense() -> None:
    named = [("w", nn.Parameter(torch.zeros(DIM, 2)))]
    exchange = SimulatedModelExchange("dense", named, CONFIG, 2)
    assert [route.kind for route in exchange._routes] == ["dense"] and list(exchange.workers) == [0, 1]
