"""Error feedback: the momentum u and the residual v that every rank keeps to itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.kernels import load_backend
from hvd_sketch.sketch import CountSketch


class Feedback:
    """``u <- m * u + g``, ``v <- v + u`` (paper, Alg. 3, lines 1 and 2), and zero both where v was sent (line 8).

    With momentum 0, u is g itself and is not kept.

    Attributes:
        momentum: ``m``.
        v: float32 [dim], the residual: everything produced here and not sent yet.
    """

    def __init__(self, dim: int, momentum: float, device: torch.device | str) -> None:
        self.momentum = momentum
        self.v = _zeros(dim, device)
        self._u = _zeros(dim if momentum else 0, device)
        self._kernels = load_backend(None, self.v.device)

    @property
    def u(self) -> Tensor:
        """float32 [dim], the momentum; zeros where momentum is 0."""
        return self._u if self.momentum else torch.zeros_like(self.v)

    def add_(self, part: Tensor, start: int = 0, sketch: CountSketch | None = None) -> None:
        """Take in coordinates ``start …`` of a gradient, float32 [n]; with ``sketch``, add their new v to it."""
        u, v = self._slices(part, start)
        if sketch is None:
            self._kernels.feedback_(u, v, part, self.momentum)
        else:
            self._kernels.feedback_accumulate_(sketch.hash, sketch.table, u, v, part, self.momentum, start)

    def preview(self, part: Tensor, start: int) -> Tensor:
        """The v that :meth:`add_` would leave, to the bit; nothing is changed. float32 [n]."""
        u, v = self._slices(part, start)
        return v + (part if u is None else (u * self.momentum).add_(part))

    def _slices(self, part: Tensor, start: int) -> tuple[Tensor | None, Tensor]:
        stop = start + part.numel()
        return self._u[start:stop] if self.momentum else None, self.v[start:stop]

    def clear_(self, indices: Tensor) -> None:
        """Zero u and v at the coordinates that were sent (momentum factor masking and error reset)."""
        for kept in (self.v, self._u) if self.momentum else (self.v,):
            self._kernels.clear_(kept, indices)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what is kept: v, and u where there is momentum."""
        return {"v": self.v.clone()} | ({"u": self._u.clone()} if self.momentum else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved v and u; u starts at zero where it was saved without momentum."""
        self.v.copy_(state["v"])
        if self.momentum:
            self._u.copy_(state["u"]) if "u" in state else self._u.zero_()


def _zeros(dim: int, device: torch.device | str) -> Tensor:
    # On a CPU NumPy asks for huge pages, torch does not: reading a million of 25 million takes 5.9 instead of 7.5 ms.
    return torch.from_numpy(np.zeros(dim, dtype=np.float32)).to(device)
