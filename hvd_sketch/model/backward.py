"""How many backward passes have reached the parameters since the last step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from hvd_sketch.model.parameters import NamedParameter


class BackwardCounter:
    """Counts each parameter's backward passes since the last step.

    Args:
        named: the parameters.
        passes: how many are expected before a step.
        ready: is called with every parameter whose last expected pass has come.
        strict: whether one more is an error, because something has been done with what ``ready`` was told.
    """

    def __init__(
        self, named: Sequence[NamedParameter], passes: int, ready: Callable[[Tensor], None], strict: bool
    ) -> None:
        self.passes = passes
        self._ready = ready
        self._strict = strict
        self._counts: dict[str, int] = {}
        counter = weakref.ref(self)  # hooks must not keep an optimizer alive, nor count for one that is gone
        for name, parameter in named:
            parameter.register_post_accumulate_grad_hook(partial(_count, counter, name))

    def any(self) -> bool:
        """Whether there was a backward pass since :meth:`reset`."""
        return bool(self._counts)

    def reset(self) -> None:
        self._counts.clear()

    def count(self, name: str, parameter: Tensor) -> None:
        """One more pass reached a parameter. Raises RuntimeError beyond the expected ones, if strict."""
        self._counts[name] = self._counts.get(name, 0) + 1
        if self._strict and self._counts[name] > self.passes:
            raise RuntimeError(
                f"{self._counts[name]} gradients reached {name!r} since the last step, expected at most "
                f"backward_passes_per_step={self.passes}, after which it was sketched (sketch_in_backward). A layer "
                "that is used several times under reentrant checkpointing counts each time. Raise "
                "backward_passes_per_step, call step() or the optimizer's zero_grad() in between, or leave out "
                "sketch_in_backward"
            )
        if self._counts[name] == self.passes:
            self._ready(parameter)


def _count(counter: weakref.ref[BackwardCounter], name: str, parameter: Tensor) -> None:
    alive = counter()
    if alive is not None:
        alive.count(name, parameter)
