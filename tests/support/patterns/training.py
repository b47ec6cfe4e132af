"""The model that patterns train, and what they compare."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hvd_sketch import (
    DistributedOptimizer,
    SketchConfig,
)
from hvd_sketch.config import Compression
from hvd_sketch.transport import Transport


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same on every rank."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def sketches() -> Iterator[SketchConfig | None]:
    """Dense, sketched, sketched with momentum."""
    yield None
    for momentum in (0.0, 0.9):
        yield SketchConfig.paper(cols=200, k=40, momentum=momentum, dense_below=100)


def wrap(
    transport: Transport,
    model: nn.Module,
    sketch: Compression | None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> DistributedOptimizer:
    if sketch is not None and sketch.momentum and make is not torch.optim.SGD:
        sketch = replace(sketch, momentum=0.0)  # Adam has one of its own
    return DistributedOptimizer(
        make(model.parameters(), lr=0.05), model.named_parameters(), sketch, transport, **options
    )


def loss(model: nn.Module, rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return model(torch.randn(8, 32, generator=generator).to(dtype)).square().mean()


def assert_equal_everywhere(transport: Transport, model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = transport.allgather(flat.unsqueeze(0))
    assert bool(torch.isfinite(every).all())
    assert torch.equal(every, every[:1].expand_as(every)), (every - every[0]).abs().max()


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
