"""When the gradients of an optimizer are averaged: by its step, by synchronize(), or by DDP's hook."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_sketch.checks import check_number
from hvd_sketch.exchange.agreement import Report
from hvd_sketch.model.broadcast import broadcast_optimizer_state
from hvd_sketch.model.levels import TwoLevels
from hvd_sketch.model.logged import LoggedOptimizer
from hvd_sketch.model.progress import Progress
from hvd_sketch.model.step_ahead import SHARE, Ahead
from hvd_sketch.observer import Kind
from hvd_sketch.shards import is_sharded

logger = logging.getLogger(__name__)


class AveragingOptimizer(LoggedOptimizer):
    """With the averaging of gradients, once for every step, whoever asks for it."""

    _progress: Progress
    _is_outside: bool  # of its process set

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also forgets backward passes since the last step. Communication: none."""
        self.inner.zero_grad(set_to_none=set_to_none)
        if self._progress.throws_away:
            self._tell_of_waste()
        self._progress.start_over()

    def begin_pass(self) -> None:
        """What :class:`hvd_sketch.DDPState` calls before a forward pass: ``model.zero_grad()`` may have come before.

        Communication: none.
        """
        if self._progress.throws_away and self._progress.is_cleared:
            self._tell_of_waste()

    def _tell_of_waste(self) -> None:
        self._progress.has_told = True
        if self._transport.rank == 0:
            logger.warning(
                "zero_grad() throws gradients away that DDP's hook has exchanged already: what of them was not sent "
                "comes later, from the residuals. Where a model's gradients are not wanted, as a discriminator's in a "
                "GAN's step of the generator, run its forward and backward pass inside its no_sync()."
            )

    @property
    def exchanges_in_backward(self) -> bool:
        """See :class:`~hvd_sketch.model.forwarding.ExchangingOptimizer`."""
        return self._progress.in_backward

    def expect_hook(self) -> None:
        """What :class:`hvd_sketch.DDPState` calls: DDP's hook will exchange. Communication: none."""
        self._progress.in_backward = True

    @contextmanager
    def ahead(self, share: float = SHARE) -> Iterator[None]:
        """Inside, this rank's parameters are ahead by its own part of what is still to be sent::

            with optimizer.ahead():
                loss_of(model, batch).backward()
            optimizer.step()

        Error feedback sends a part of every gradient late, and meanwhile gradients are those of parameters that lack
        it. But a rank knows its own part, and what the wrapped optimizer will make of it: its residual over the root of
        the second moment, times the learning rate. Forward and backward passes in this block, also several, are those
        of parameters that are moved a quarter of that way. At its end, or where a step is taken inside, they are put
        back to the bit, and are what all ranks share. No byte more is sent, and checkpoints need nothing of it. What it
        gains is in docs/language_models.md.

        Memory: a copy of the parameters that are compressed, from the first time on.

        Args:
            share: of the way, from 0 to 1.

        Raises:
            ValueError: another share; what is wrapped is not Adam, AdamW or LagAdamW; nothing is compressed, or with
                two levels.
            RuntimeError: at the end: parameters were changed in place inside.

        Communication: none; ranks may differ in whether they use it.

        Source: after Xu, Huo and Huang, Step-Ahead Error Feedback for Distributed Training with Compressed Gradient,
        2020, arXiv:2008.05823, which moves all of the way, with SGD.
        """
        check_number("share", share, most=1.0)
        gradients = self._gradients
        if isinstance(gradients, TwoLevels):
            raise ValueError("ahead() is for levels=1: with two, one rank of a host has the residuals of all of them")
        if not gradients.unsent:
            if not self._is_outside and not any(map(is_sharded, self._parameters)):
                raise ValueError("nothing is compressed, so nothing is sent late: leave ahead() out")
            yield  # other ranks may hold shards that are compressed, or be in a process set
            return
        ahead = self._progress.ahead = self._progress.ahead or Ahead(self.inner, gradients.scale)
        if ahead.is_there:  # a block inside of another one
            yield
            return
        ahead.go_(gradients.unsent, share)
        try:
            yield
        finally:
            ahead.back_()

    def _put_back(self) -> None:
        if self._progress.ahead is not None:
            self._progress.ahead.back_()

    def synchronize(self) -> bool:
        """Average the gradients now, so that they can be clipped before ``step()``, as in Horovod::

            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()

        With a GradScaler, ``scaler.unscale_(optimizer)`` comes first: residuals outlive the loss scale.

        Returns:
            Whether ``p.grad`` is the average; False: all ranks skip, and it is NaN.

        Communication: collective, all ranks. Modifies ``p.grad`` and the residuals.
        """
        return self._exchange(None, None)

    @torch.no_grad()
    def average_in_backward(self, loss_scale: float | None = None) -> None:
        """What :func:`hvd_sketch.ddp_hook` calls at the end of a backward pass; ``step()`` then exchanges nothing.

        Args:
            loss_scale: what the gradients are multiplied by, before and afterwards. They are exchanged without it.

        Communication: collective, all ranks. Modifies ``p.grad`` and the residuals.
        """
        if not self._progress.has_backward:  # called by DDP's join(): this rank has run out of data
            self._average(Report(done=True, refusal=self._refused_in_join()), None)
            for parameter in self._parameters:
                parameter.grad = None  # no step of its own takes it
        elif loss_scale is None:
            self._exchange(None, None)
        else:
            self._exchange(torch.tensor(loss_scale, dtype=torch.float32, device="cpu"), 0.0)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(loss_scale)

    def _average(self, report: Report, inverse_scale: torch.Tensor | None) -> bool:
        """Average, and where ranks are back that had left DDP's join() early, :meth:`catch_up_after_join`."""
        had_data = self._gradients.active
        is_averaged = self._gradients.average(report, inverse_scale)
        if not set(self._gradients.active) <= set(had_data):
            self.catch_up_after_join(had_data)
        return is_averaged

    def catch_up_after_join(self, left_last: tuple[int, ...]) -> None:
        """Ranks that left DDP's join() early, which gives them parameters alone, get the state of one that left last.

        Args:
            left_last: the ranks that had data in the last step.

        Communication: collective, all ranks, where DDP's hook exchanges and some had none; otherwise none.
        """
        if self._progress.in_backward and len(left_last) < self._transport.size:
            broadcast_optimizer_state(self.inner, left_last[0], self._transport)

    def _refused_in_join(self) -> RuntimeError | None:
        if isinstance(self._gradients, TwoLevels):
            return RuntimeError(
                "DDP's join() expected levels=1, got levels=2: a host does not know which ranks of others left early. "
                "Give every rank as many batches, or leave DDP out and take optimizer.join()"
            )
        return None

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside, ``step()`` takes the gradients as ``synchronize()`` left them."""
        self._progress.skip_synchronize = True
        try:
            yield
        finally:
            self._progress.skip_synchronize = False

    def _exchange(self, grad_scale: Any, found_inf: Any) -> bool:
        """Average all gradients into ``p.grad``; False when all ranks skip.

        Whether these are averaged already is not for one rank to decide: it says so, and all ranks learn it.
        """
        refusal: RuntimeError | None = None
        try:
            self._put_back()
        except RuntimeError as error:  # no other rank shall wait for this one
            refusal = error
        progress = self._progress
        is_held = progress.holds_averaged
        if is_held:
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(), "
                "or synchronize() called twice: the gradients are averaged already and are not exchanged again",
                stacklevel=3,
            )
        report = Report(
            finite=is_held or found_inf is None or not float(found_inf),
            scaled=found_inf is not None,
            forgives=progress.forgives,
            held=is_held,
            refusal=refusal or self._unregistered(),
            groups=self.inner.param_groups,
            was_unused=progress.was_unused,
        )
        inverse_scale = None if grad_scale is None else torch.as_tensor(grad_scale).double().reciprocal().float()
        observer = self.ledger.observer
        with observer.span(Kind.EXCHANGE, "exchange"):
            is_averaged = self._average(report, inverse_scale)
        progress.forgives = False
        if not is_held:
            progress.note_exchange(is_averaged)
            observer.end_step(self._gradients.step_number - 1, is_averaged)
        return bool(progress.exchanged)
