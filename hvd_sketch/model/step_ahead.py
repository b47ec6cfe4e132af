"""Step-ahead error feedback: a rank takes its gradients where the part that it has not sent yet will lead."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvd_sketch.checks import check_number
from hvd_sketch.kernels.step_ahead import Move, step_ahead_
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.model.levels import TwoLevels
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.shards import local

SHARE = 0.25  # between ranks that have little in common, which would give 1 / ranks, and ranks that are alike: 1
MOST = 3.0  # learning rates that a coordinate moves at most, before the share: a sum of few squares may be too small
TOLD_AFTER = 10  # exchanges in which the model was not seen to train
logger = logging.getLogger(__name__)
Unsent = Iterable[tuple[Tensor, Tensor]]  # parameters, and what is left of their gradients, float32 of their shapes


class Ahead:
    """Moves parameters by what an optimizer will make of gradients that are still to come, and back to the bit.

    Args:
        optimizer: ``Adam``, ``AdamW``, ``LagAdamW``. It is not stepped.
        share: of what the optimizer would make of them.
        scale: of what it gets, in times of these gradients.

    Raises:
        ValueError: an optimizer of which it is not known what it will make of a gradient.

    Memory: a copy of the parameters that were moved.

    Communication: none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, share: float = SHARE, scale: float = 1.0) -> None:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(
                f"StepAhead pays with Adam, AdamW and hvd_sketch.optim.LagAdamW, and knows what these will make of a "
                f"gradient that arrives late, got {type(optimizer).__name__}: leave StepAhead out"
            )
        self._optimizer = optimizer
        self._share, self._scale = share, scale
        self._kept: dict[Tensor, Tensor] = {}  # where parameters were; the memory stays
        self._moved: list[tuple[Tensor, int]] = []  # parameters that are ahead, and their version then

    @property
    def is_there(self) -> bool:
        """The parameters are ahead."""
        return bool(self._moved)

    @torch.no_grad()
    def go_(self, unsent: Unsent) -> None:
        """Move the parameters. One that the optimizer has no state of yet stays where it is."""
        groups = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        for parameter, left in unsent:
            state = self._optimizer.state.get(parameter)
            if not state:
                continue
            here, group = local(parameter), groups[parameter]
            if parameter not in self._kept:
                self._kept[parameter] = torch.empty_like(here)
            squares = local(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
            step_ahead_(here, left, squares, self._kept[parameter], self._move(group, state))
            self._moved.append((parameter, here._version))

    def _move(self, group: Mapping[str, Any], state: Mapping[str, Tensor]) -> Move:
        rate = float(group["lr"]) * self._share * (-1 if group["maximize"] else 1)
        correction = 1 - group["betas"][1] ** (step if (step := state["step"]).is_cuda else float(step))
        root = correction.rsqrt() if isinstance(correction, Tensor) else 1 / math.sqrt(correction)  # without a wait
        return Move(self._scale, root, group["eps"], MOST, rate)

    @torch.no_grad()
    def swap_(self) -> None:
        """Give the parameters their shared values for a while, before the backward pass; then the others again."""
        for parameter, _ in self._moved:
            here = local(parameter).data  # unseen by autograd: what waits for its backward pass finds all as it was
            moved = here.clone()
            here.copy_(self._kept[parameter])
            self._kept[parameter].copy_(moved)

    @torch.no_grad()
    def back_(self) -> None:
        """Put back what was moved.

        Raises:
            RuntimeError: something else has changed a parameter that was ahead, and the change would be lost.
        """
        moved, self._moved = self._moved, []
        changed = sum(local(parameter)._version != version for parameter, version in moved)
        for parameter, _ in moved:
            local(parameter).copy_(self._kept[parameter])
        if changed:
            raise RuntimeError(
                f"{changed} of {len(moved)} parameters were changed in place between a forward pass and the step that "
                "follows it, while StepAhead had moved them, and were put back: change them after optimizer.step()"
            )


class StepAhead:
    """Between forward pass and step each rank's parameters are ahead by its own part of what is still to be sent::

        optimizer = DistributedOptimizer(optimizer, model.named_parameters(), compression)
        StepAhead(model, optimizer)

    Error feedback sends a part of every gradient late, and meanwhile gradients are those of parameters that lack it.
    But a rank knows its own part, and what the wrapped optimizer will make of it: its residual over the root of the
    second moment, times the learning rate. A forward pass of a model in training mode, with gradients enabled, begins
    by moving the parameters a quarter of that way; ``step()`` first puts them back to the bit, and exchanges and steps
    as ever. No byte more is sent. All else sees the parameters that all ranks share: the comparison between ranks,
    other forward passes of the model, also of one in training mode under ``torch.no_grad()``, and ``state_dict()`` and
    ``load_state_dict()``, which put them back.

    How much it gains is in docs/language_models.md. With SGD it gained nothing in trials on CIFAR-10.

    Memory: a copy of the parameters that are compressed.

    Communication: none. It is right also where a part of the ranks has it.

    Args:
        model: what is called in a training step. Of a compiled one, what ``torch.compile`` returned.
        optimizer: wraps ``Adam``, ``AdamW`` or ``LagAdamW``; it keeps this object alive.
        share: of the way. 1 over the number of ranks is what a rank's own part itself will do; more takes the other
            ranks' parts to be like it.

    Raises:
        ValueError: a share outside of [0, 1]; another optimizer; one that compresses nothing, has two levels, or has no
            parameter of the model.

    Source: after Xu, Huo and Huang, Step-Ahead Error Feedback for Distributed Training with Compressed Gradient, 2020,
    arXiv:2008.05823, which moves all of the way, with SGD.
    """

    def __init__(self, model: nn.Module, optimizer: DistributedOptimizer, share: float = SHARE) -> None:
        check_number("share", share, most=1.0)
        gradients = _checked(model, optimizer)
        self._gradients, self._unsent = gradients, gradients.unsent
        self._ahead = Ahead(optimizer.inner, share, gradients.scale)
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        self._told = type(model).__name__
        self._lent = False  # a forward pass that is no training has the shared values for itself
        self._tells_at = gradients.step_number + TOLD_AFTER
        # Not in the graphs of compiled models and steps. No decorator, see GradientExchange.
        self.go = torch.compiler.disable(self.go)  # type: ignore[method-assign]
        self.end = torch.compiler.disable(self.end)  # type: ignore[method-assign]
        self.put_back = torch.compiler.disable(self.put_back)  # type: ignore[method-assign]
        optimizer.before_change(self.put_back)
        hook = _Hook(self)
        model.register_forward_pre_hook(hook.go, prepend=True)
        model.register_forward_hook(hook.end, always_call=True)
        model.register_state_dict_pre_hook(hook.put_back)
        model.register_load_state_dict_pre_hook(hook.put_back)

    def go(self, model: nn.Module) -> None:
        """What a forward pass of the model begins with. Communication: none."""
        if model is not self._model() or self._optimizer() is None:
            return
        if not (model.training and torch.is_grad_enabled()):
            self._lent = self._ahead.is_there
            self._ahead.swap_()
        elif not self._ahead.is_there:
            self._ahead.go_(self._unsent)
            self._tells_at = -1

    def end(self, model: nn.Module) -> None:
        """What a forward pass of the model ends with. Communication: none."""
        if self._lent and model is self._model():
            self._lent = False
            self._ahead.swap_()

    def put_back(self) -> None:
        """Give the parameters their shared values again. Communication: none."""
        if self._lent:
            self._lent = False
            self._ahead.swap_()
        self._ahead.back_()
        if self._tells_at == self._gradients.step_number:
            self._tells_at = -1
            logger.warning(
                "StepAhead has no effect: in %d steps the %s was not called in training mode with gradients enabled: "
                "give it the module that your training step calls",
                *(TOLD_AFTER, self._told),
            )


class _Hook:
    """Of a model, which neither keeps the optimizer alive nor copies it with itself."""

    def __init__(self, ahead: StepAhead | None = None) -> None:
        self._ahead = weakref.ref(ahead) if ahead is not None else None

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()  # a copy of the model has no part in this optimizer

    def _alive(self) -> StepAhead | None:
        return self._ahead() if self._ahead is not None else None

    def go(self, model: nn.Module, inputs: Any) -> None:
        ahead = self._alive()
        if ahead is not None:
            ahead.go(model)

    def end(self, model: nn.Module, inputs: Any, result: Any) -> None:
        ahead = self._alive()
        if ahead is not None:
            ahead.end(model)

    def put_back(self, *_: Any) -> None:
        ahead = self._alive()
        if ahead is not None:
            ahead.put_back()


def _checked(model: nn.Module, optimizer: DistributedOptimizer) -> GradientExchange:
    if not isinstance(optimizer, DistributedOptimizer):
        raise ValueError(f"optimizer must be a DistributedOptimizer, got {type(optimizer).__name__}: wrap it first")
    gradients = optimizer.gradients
    if isinstance(gradients, TwoLevels):
        raise ValueError("StepAhead is for levels=1: with two, one rank of a host has the residuals of all of them")
    if not gradients.unsent:
        raise ValueError("the optimizer compresses nothing, so nothing is sent late: leave StepAhead out")
    own = set(model.parameters())
    if not any(parameter in own for parameter, _ in gradients.unsent):
        raise ValueError("the model has none of the parameters that the optimizer compresses: give StepAhead theirs")
    return gradients
