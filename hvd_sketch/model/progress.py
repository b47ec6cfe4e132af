"""What has been done with ``p.grad`` since the last step of an optimizer. All of it is local."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.model.drift import checksums
from hvd_sketch.model.step_ahead import Ahead


class Progress:
    """Knows whether the gradients of some parameters are averaged, and sees backward passes that change them.

    An object of its own, because Lightning's wrapper inherits from the class of the optimizer it wraps: the wrapped
    optimizer does not see what methods assign to ``self`` there.

    Args:
        parameters: those of the optimizer that are exchanged.

    Attributes:
        exchanged: of ``p.grad``: None not yet, True averaged, False skipped.
        has_backward: a backward pass has reached a parameter since the last exchange.
        skip_synchronize: inside of ``skip_synchronize()``.
        in_backward: a hook of DDP's will exchange at the end of backward passes. DDP may put other tensors into
            ``p.grad``.
        forgives: a ``GradScaler`` has judged the last step, too.
        has_told: that gradients were exchanged in vain.
        was_unused: no step was made with what the last exchange has averaged.
        ahead: what moves the parameters for backward passes, once it was asked for.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.exchanged: bool | None = None
        self.has_backward = self.skip_synchronize = self.in_backward = self.forgives = self.has_told = False
        self.was_unused = False
        self.ahead: Ahead | None = None
        self._averaged: list[weakref.ref[Tensor] | None] = []  # p.grad as the last exchange left it
        self._readers: set[str] = set()  # methods that were seen to change no parameter
        progress = weakref.ref(self)  # hooks must not keep an optimizer alive

        def see(_: Tensor) -> None:
            alive = progress()
            if alive is not None:
                alive.has_backward = True

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(see)

    @property
    def awaits_step(self) -> bool:
        """An exchange has been made, and no backward pass has come since."""
        return self.exchanged is not None and not self.has_backward

    @property
    def throws_away(self) -> bool:
        """Gradients that were exchanged in a backward pass wait for a step; False where that was told before."""
        return bool(self.exchanged) and self.in_backward and not self.has_backward and not self.has_told

    @property
    def is_cleared(self) -> bool:
        """No parameter has a gradient that is not zero."""
        return not any(p.grad is not None and bool(p.grad.any()) for p in self._parameters)

    @property
    def takes_averaged(self) -> bool:
        """The next step is to be made with what the last exchange left."""
        return self.skip_synchronize or (self.in_backward and self.awaits_step)

    @property
    def holds_averaged(self) -> bool:
        """``p.grad`` is what the last exchange left, and no step was made with it."""
        return self.awaits_step and all(self._unchanged())

    @property
    def has_new_gradients(self) -> bool:
        """There are gradients that were not averaged."""
        pairs = zip(self._parameters, self._unchanged(), strict=True)
        return self.has_backward or any(p.grad is not None and not unchanged for p, unchanged in pairs)

    def note_exchange(self, averaged: bool) -> None:
        """The gradients are averaged, or all ranks skipped. They are not kept alive."""
        self.exchanged, self.has_backward, self.was_unused = averaged, False, averaged
        self._averaged = [None if p.grad is None else weakref.ref(p.grad) for p in self._parameters]

    def note_step(self) -> None:
        """A step was made with what the last exchange averaged, or that belongs to a state that is no longer there."""
        self.was_unused = False

    def start_over(self) -> None:
        """The gradients have been used, or thrown away."""
        self.exchanged, self.has_backward = None, False

    def _unchanged(self) -> list[bool]:
        """For each parameter whether ``p.grad`` is the tensor that the last exchange left, or None as then."""
        if self.in_backward:
            return [self.awaits_step] * len(self._parameters)
        if len(self._averaged) != len(self._parameters):
            return [False] * len(self._parameters)
        kept = [None if reference is None else reference() for reference in self._averaged]
        return [
            parameter.grad is gradient and (reference is None or gradient is not None)
            for parameter, gradient, reference in zip(self._parameters, kept, self._averaged, strict=True)
        ]

    def guarded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the optimizer that may not step with gradients that were not exchanged.

        A method that left the parameters as they were once is taken for one that only reads.

        Args:
            name: tells the method, as ``Class.method``.
            method: to be called.

        Raises:
            RuntimeError: when called: it changed parameters by such gradients.
        """
        if name in self._readers:
            return method

        @wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            if self.exchanged is False:
                return self._without_gradients(method, *arguments, **options)  # NaN: not to be stepped with
            if not self.has_new_gradients:
                before = checksums(self._parameters)
                versions = [parameter._version for parameter in self._parameters]
                result = method(*arguments, **options)
                if self.has_backward:  # the method's own backward pass, of parameters that it may have put back
                    if not torch.equal(before, checksums(self._parameters)):
                        raise _drifted(name)
                elif versions != [parameter._version for parameter in self._parameters]:
                    if self.exchanged:  # otherwise zero_grad() has thrown away what was averaged
                        self.note_step()
                    self.start_over()
                return result
            before = checksums(self._parameters)
            result = method(*arguments, **options)
            if not torch.equal(before, checksums(self._parameters)):
                raise _drifted(name)
            self._readers.add(name)
            return result

        return call

    def _without_gradients(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method while no parameter has a gradient."""
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            return method(*arguments, **options)
        finally:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient


def _drifted(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}() changed parameters by gradients that were not exchanged, and the ranks have drifted apart: call "
        f"optimizer.synchronize() on every rank before {name.split('.')[-1]}(), or step by optimizer.step()"
    )
