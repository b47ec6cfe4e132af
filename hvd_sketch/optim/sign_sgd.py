"""SignSGD: every coordinate that arrives moves by the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvd_sketch.checks import check_flag, check_number


class SignSGD(torch.optim.Optimizer):
    """``w <- (1 - lr * weight_decay) * w - lr * sign(g)``. It keeps no state.

    For exchanges that send a few coordinates at a time and forget a part of what waits:
    ``SketchConfig(residual_decay=0.95)``. With such a residual, which averages the gradients of about 20 steps, it
    needs neither momentum nor second moments: the residual's 4 bytes per parameter in all. A step takes the memory of
    one gradient's signs, parameter by parameter.

    Args:
        params: as of ``torch.optim.SGD``.
        lr: how far a coordinate moves: two to four times the learning rate of Adam.
        weight_decay: decoupled, as of ``torch.optim.AdamW``.
        maximize: go up instead of down.

    Raises:
        ValueError: an argument out of range.

    Communication: none.

    Source: Peng et al., DeMo: Decoupled Momentum Optimization, 2024, arXiv:2411.19870, without its cosine transform.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, *, maximize: bool = False) -> None:
        check_number("lr", lr)
        check_number("weight_decay", weight_decay)
        check_flag("maximize", maximize)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what ``closure`` returned, or None.

        Args:
            closure: evaluated once, with gradients enabled, before the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = -group["lr"] if group["maximize"] else group["lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(parameter.grad.sign().mul_(rate))
        return loss
