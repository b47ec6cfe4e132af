"""SignSGD: the recurrence, weight decay, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_sketch.optim import SignSGD


@pytest.mark.parametrize("maximize", [False, True])
def test_moves_by_the_learning_rate(maximize: bool) -> None:
    parameter, other = nn.Parameter(torch.tensor([1.0, 2.0, 4.0])), nn.Parameter(torch.ones(2))
    optimizer = SignSGD([parameter, other], lr=0.5, weight_decay=0.25, maximize=maximize)
    parameter.grad = torch.tensor([-3.0, 0.0, 1e-20])
    assert optimizer.step(lambda: 7) == 7
    moved = torch.tensor([-0.5, 0.0, 0.5]) if maximize else torch.tensor([0.5, 0.0, -0.5])
    assert torch.equal(parameter.detach(), torch.tensor([0.875, 1.75, 3.5]) + moved)
    assert torch.equal(other.detach(), torch.ones(2))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"maximize": 1}])
def test_refusals(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        SignSGD([nn.Parameter(torch.zeros(2))], **settings)
