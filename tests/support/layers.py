"""Two layers on seeded inputs, and every way to compress their gradients: for tests of what torch does to a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_sketch import LowRankConfig, SketchConfig
from hvd_sketch.config import Compression

COMPRESSIONS: dict[str, Compression | None] = {
    "dense": None,
    "sketched": SketchConfig(cols=300, k=150),
    "nominated": SketchConfig(k=150, candidates="nominate"),
    "low rank": LowRankConfig(rank=2),
}


def build(seed: int = 0) -> nn.Sequential:
    """With a bias that does not divide by the number of shards."""
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 63))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * rank + step))
    return model(inputs).square().mean()
