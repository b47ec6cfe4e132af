"""Error feedback: the momentum u and the residual v that every rank keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Feedback:
    """``u <- m * u + g``, ``v <- v + u`` (paper, Alg. 3, lines 1 and 2), and zero both where v was sent (line 8).

    With momentum 0, u is g itself and is not kept.

    Attributes:
        momentum: ``m``.
        v: float32 [dim], the residual: everything produced here and not sent yet.
    """

    def __init__(self, dim: int, momentum: float, device: torch.device | str) -> None:
        self.momentum = momentum
        self.v = torch.zeros(dim, device=device)
        self._u = torch.zeros(dim if momentum else 0, device=device)

    @property
    def u(self) -> Tensor:
        """float32 [dim], the momentum; zeros where momentum is 0."""
        return self._u if self.momentum else torch.zeros_like(self.v)

    def add_(self, gradient: Tensor) -> None:
        """Take in a gradient, float32 [dim]."""
        if self.momentum:
            gradient = self._u.mul_(self.momentum).add_(gradient)
        self.v += gradient

    def clear_(self, indices: Tensor) -> None:
        """Zero u and v at the coordinates that were sent (momentum factor masking and error reset)."""
        self.v[indices] = 0
        if self.momentum:
            self._u[indices] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what is kept: v, and u where there is momentum."""
        return {"v": self.v.clone()} | ({"u": self._u.clone()} if self.momentum else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved v and u; u starts at zero where it was saved without momentum."""
        self.v.copy_(state["v"])
        if self.momentum:
            self._u.copy_(state["u"]) if "u" in state else self._u.zero_()
