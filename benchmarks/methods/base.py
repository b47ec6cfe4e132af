"""What competitors share: they are exchanges, of the leanest kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch import SketchConfig
from hvd_sketch.exchange.base import Exchange, Options, Ranges, SparseUpdate


class Lean:
    """Steps without the agreement on finite gradients, which competitors do not have; mixed into an exchange."""

    def step(self: Any, gradient: Tensor | Sequence[Tensor], finite: bool = True) -> SparseUpdate:
        """Accumulate, then agree. May overwrite the gradient. Communication: collective."""
        self.ledger.begin_step()
        self.accumulate([gradient] if isinstance(gradient, Tensor) else gradient)
        return self.agree()


class WholeGradient(Lean, Exchange):
    """A competitor that keeps no residual of ours: it makes a mean of the whole gradient, in the gradient's memory.

    Subclasses implement :meth:`_mean_`.
    """

    holds_gradient = True

    def __init__(self, config: SketchConfig | None, dim: int, *place: Any, **options: Unpack[Options]) -> None:
        super().__init__(None, dim, *place, **options)
        self._gradient = torch.empty(0)

    @property
    def residual(self) -> Tensor:
        """Zeros: nothing stays behind."""
        return torch.zeros(self.dim, device=self._device)

    velocity = residual

    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        self._gradient = torch.cat(list(gradient)) if len(gradient) > 1 else gradient[0].detach()

    def agree(self) -> SparseUpdate:
        self.ledger.compare_with_dense(self.dim, self._dense_bytes, 2 * self.dim)
        with self._comm.phase("mean"):
            mean = self._mean_(self._gradient)
        self.count_step()
        return SparseUpdate(None, mean)

    @abstractmethod
    def _mean_(self, gradient: Tensor) -> Tensor:
        """The mean over ranks, float32 [dim]; may be the gradient, overwritten. Communication: collective."""

    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        """Nothing: what a rank keeps stays with it."""

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        return self._counters(None)

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        return partial(self._load_counters, self._saved(state))
