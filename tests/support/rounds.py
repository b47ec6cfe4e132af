"""A small model that exchanges every H steps."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from hvd_sketch import LocalSteps, LowRankConfig, SketchConfig
from hvd_sketch.config import Compression
from hvd_sketch.transport import Transport

COMPRESSIONS: dict[str, Compression | None] = {
    "dense": None,
    "sketch": SketchConfig(cols=400, k=100),
    "nominate": SketchConfig(k=200, candidates="nominate"),
    "random": SketchConfig(k=400, candidates="random"),
    "low rank": LowRankConfig(rank=2, dense_below=1024),
}
plain_outer = partial(torch.optim.SGD, lr=1.0)


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 40))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


def loss_of(model: nn.Module, rank_and_step: tuple[int, int]) -> Tensor:
    rank, step = rank_and_step
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return model(torch.randn(8, 30, generator=generator)).square().mean()


def backward(model: nn.Module, rank: int, step: int, scale: float = 1.0) -> None:
    (loss_of(model, (rank, step)) * scale).backward()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def wrap(transport: Transport, model: nn.Module, compression: Compression | None, **options: Any) -> LocalSteps:
    inner = options.pop("inner", adam)(model)
    return LocalSteps(inner, model.named_parameters(), compression, transport, **options)


def train(model: nn.Module, optimizer: LocalSteps, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def trained(transport: Transport, name: str, steps: int = 12, every: int = 4) -> Tensor:
    model = network()
    train(model, wrap(transport, model, COMPRESSIONS[name], every=every), transport.rank, range(steps))
    return flat(model.parameters())


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = BytesIO()
    torch.save(state, file)
    return torch.load(BytesIO(file.getvalue()), weights_only=True)
