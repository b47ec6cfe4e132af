"""A model of 63 whole-numbered gradients for tests of DistributedOptimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from hvd_sketch.config import SketchConfig
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, local_transports

LIMIT_S = 60
RANKS = [1, 2, 3, 4]


def everything(dim: int, **settings: Any) -> SketchConfig:
    """k = dim, no momentum: every coordinate is sent in every step.

    So many columns that no estimate is an exact zero through a collision: those are never candidates.
    """
    return SketchConfig.paper(
        **{"cols": 100 * dim, "k": dim, "oversample": 1, "momentum": 0.0, "dense_below": 8, **settings}
    )


def little(**settings: Any) -> SketchConfig:
    """10 of 60 coordinates a step, so that residuals fill up."""
    return SketchConfig.paper(**{"cols": 40, "k": 10, "oversample": 2, "momentum": 0.0, "dense_below": 8, **settings})


class Toy(nn.Module):
    """60 coordinates to sketch and 3 dense ones, in the order weight, bias, other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 8, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.other = nn.Parameter(torch.zeros(2, 2, 5, dtype=dtype))

    def backward(self, rank: int, step: int, factor: float = 1.0) -> None:
        """A backward pass whose gradients are ``factor`` times the whole numbers of :func:`integers`."""
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(self.parameters(), integers(rank, step), strict=True))
        (loss * factor).backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters() if p.grad is not None]


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector, detached."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def integers(rank: int, step: int) -> list[Tensor]:
    """Gradients of Toy in whole numbers, none of them zero: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    shapes = [(5, 8), (3,), (2, 2, 5)]
    return [torch.randint(1, 9, shape, generator=generator).float() for shape in shapes]


def mean_of(ranks: int, step: int) -> list[Tensor]:
    return [sum(parts) / ranks for parts in zip(*(integers(rank, step) for rank in range(ranks)), strict=True)]


def wrap(
    transport: LocalTransport, model: nn.Module, sketch: SketchConfig | None, **kwargs: Any
) -> DistributedOptimizer:
    return DistributedOptimizer(SGD(model.parameters(), lr=1.0), model.named_parameters(), sketch, transport, **kwargs)


def alone() -> LocalTransport:
    return local_transports(1)[0]


def assert_all_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
