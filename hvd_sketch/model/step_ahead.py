"""Step-ahead error feedback: a rank takes its gradients where the part that it has not sent yet will lead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.kernels.step_ahead import Move, step_ahead_
from hvd_sketch.shards import local

SHARE = 0.25  # better than 0.1 and 0.5 with 4 ranks, and than 1 / 16 and 0.5 with 16
MOST = 3.0  # learning rates that a coordinate moves at most, before the share: a sum of few squares may be too small
Unsent = Iterable[tuple[Tensor, Tensor]]  # parameters, and what is left of their gradients, float32 of their shapes


class Ahead:
    """Moves parameters by what an optimizer will make of gradients that are still to come, and back to the bit.

    Args:
        optimizer: ``Adam``, ``AdamW``, ``LagAdamW``. It is not stepped.
        scale: of what it gets, in times of these gradients.

    Raises:
        ValueError: an optimizer of which it is not known what it will make of a gradient.

    Memory: a copy of the parameters that were moved.

    Communication: none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(
                "what Adam, AdamW and hvd_sketch.optim.LagAdamW make of a gradient that arrives late is known, got "
                f"{type(optimizer).__name__}: leave ahead() out"
            )
        self.optimizer = optimizer
        self._scale = scale
        self._kept: dict[Tensor, Tensor] = {}  # where parameters were; the memory stays
        self._moved: list[tuple[Tensor, int]] = []  # parameters that are ahead, and their version then

    @property
    def is_there(self) -> bool:
        """The parameters are ahead."""
        return bool(self._moved)

    @torch.no_grad()
    def go_(self, unsent: Unsent, share: float = SHARE) -> None:
        """Move the parameters by a share of what the optimizer will make of gradients.

        One that it has no state of yet, or that is frozen, stays.
        """
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter, left in unsent:
            state = self.optimizer.state.get(parameter)
            if not state or not parameter.requires_grad:
                continue
            here, group = local(parameter), groups[parameter]
            if parameter not in self._kept:
                self._kept[parameter] = torch.empty_like(here)
            squares = local(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
            step_ahead_(here, left, squares, self._kept[parameter], self._move(group, state, share))
            self._moved.append((parameter, here._version))

    def _move(self, group: Mapping[str, Any], state: Mapping[str, Tensor], share: float) -> Move:
        rate = float(group["lr"]) * share * (-1 if group["maximize"] else 1)
        correction = 1 - group["betas"][1] ** (step if (step := state["step"]).is_cuda else float(step))
        if isinstance(correction, Tensor):  # on a GPU, for which nobody waits here
            root: float | Tensor = correction.rsqrt()
        else:
            root = 1 / math.sqrt(correction) if correction else math.inf  # before the first step
        return Move(self._scale, root, group["eps"], MOST, rate)

    @torch.no_grad()
    def back_(self) -> None:
        """Put back what was moved.

        Raises:
            RuntimeError: something else has changed a parameter that was ahead, and the change would be lost.
        """
        moved, self._moved = self._moved, []
        changed = sum(local(parameter)._version != version for parameter, version in moved)
        for parameter, _ in reversed(moved):  # some may share their memory
            local(parameter).copy_(self._kept[parameter])
        if changed:
            raise RuntimeError(
                f"{changed} of {len(moved)} parameters were changed inside ahead(), and are now what they were "
                "before it: change them outside"
            )
