"""What the exchange tests run on each rank; see harness.launch."""

from __future__ import annotations

from typing import Any

import torch

from hvd_sketch import DistributedOptimizer, broadcast_parameters
from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.sketched import SketchedAllreduce
from hvd_sketch.transport import Transport
from tests.support.toy import flat


def integer_gradient(dim: int, rank: int, step: int) -> torch.Tensor:
    """Heavy-tailed whole numbers, many zeros: float32 sums of them are exact in any order."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.randn(dim, generator=generator) ** 3 * 2).round().clamp(-1000, 1000)


def float_gradient(dim: int, rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(dim, generator=generator) ** 3


def run_steps(
    transport: Transport, dim: int, steps: int, config: dict[str, Any], integers: bool = False
) -> dict[str, Any]:
    """A few steps of one exchange: its updates, what stays behind, and the ledger."""
    exchange = SketchedAllreduce(SketchConfig.paper(**config), dim, transport)
    gradient = integer_gradient if integers else float_gradient
    updates = [exchange.step(gradient(dim, transport.rank, step)) for step in range(steps)]
    return {
        "indices": [update.indices for update in updates],
        "values": [update.values for update in updates],
        "residual": exchange.residual.clone(),
        "velocity": exchange.velocity.clone(),
        "records": list(exchange.ledger.records),
        "ratios": (exchange.ledger.compression_ratio(), exchange.ledger.paper_compression_ratio()),
    }


def run_many(transport: Transport, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several :func:`run_steps` in one launch: starting processes is slow."""
    return [run_steps(transport, **case) for case in cases]


TRAININGS: dict[str, Compression] = {
    "paper": SketchConfig.paper(cols=300, k=60, momentum=0.5),
    "sketch": SketchConfig(cols=300, k=300),
    "nominate": SketchConfig(k=300, candidates="nominate"),
    "random": SketchConfig(k=600, candidates="random"),
    "low rank": LowRankConfig(rank=2),
}


def train(transport: Transport, config: Compression, steps: int = 50) -> torch.Tensor:
    """A small model on data that differ between ranks, compressed and dense tensors together: all parameters."""
    torch.manual_seed(transport.rank)  # different starts, made equal by the broadcast
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Tanh(), torch.nn.Linear(64, 30))
    broadcast_parameters(model.state_dict(), 0, transport)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), config, transport)
    generator = torch.Generator().manual_seed(100 + transport.rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 40, generator=generator)).square().mean().backward()
        optimizer.step()
    return flat(model)


def everything(transport: Transport, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """:func:`run_many` and :func:`train` in one launch."""
    parameters = [train(transport, config) for config in TRAININGS.values()]
    return {"cases": run_many(transport, cases), "parameters": torch.stack(parameters)}
