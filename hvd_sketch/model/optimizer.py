"""DistributedOptimizer: gradients in, sparse averaged gradients out, then the user's optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Literal

import torch

from hvd_sketch.checks import check_choice
from hvd_sketch.config import ALL_DENSE, Compression
from hvd_sketch.exchange.agreement import all_finite
from hvd_sketch.exchange.saved import SavedState
from hvd_sketch.exchange.setup import refused_together, require_equal
from hvd_sketch.logs import outputs_of
from hvd_sketch.model.averaging import AveragingOptimizer
from hvd_sketch.model.gradients import CHECK_EVERY, GradientExchange
from hvd_sketch.model.joining import join
from hvd_sketch.model.levels import TwoLevels
from hvd_sketch.model.mesh import shard_number
from hvd_sketch.model.parameters import NamedParameter, check_exchangeable, name_parameters
from hvd_sketch.model.progress import Progress
from hvd_sketch.model.routes import mark_sparse
from hvd_sketch.model.settings import require_equal_optimizers
from hvd_sketch.model.wrapping import (
    HorovodArguments,
    check_arguments,
    compression_of,
    describe,
    is_outside,
    transport_of,
    warn_about_settings,
)
from hvd_sketch.shards import local
from hvd_sketch.transport import HorovodTransport, Transport

STATE_KEY = "hvd_sketch"
ROUND_KEY = "hvd_sketch_round"  # of LocalSteps
logger = logging.getLogger(__name__)


class DistributedOptimizer(AveragingOptimizer):
    """A torch optimizer whose ``step()`` first averages the gradients over all ranks, sketched.

    ``param_groups``, ``state``, ``defaults`` and hooks are the wrapped optimizer's own objects, so
    learning-rate schedulers may be attached to either. Its other methods can be called, too, but not to change
    parameters by gradients that were not exchanged: ``synchronize()`` first.

    A parameter of which no rank has a gradient is left alone, as in torch; of which one rank has, all ranks update it.
    Whether a rank has frozen it plays no part.

    A step whose gradient is not finite on any rank is skipped on all: parameters, momentum and residuals stay as they
    were, ``p.grad`` is NaN on every rank, and it is counted.

    With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` on every rank; the scales may differ. To
    clip averaged gradients, ``scaler.unscale_(optimizer)`` comes before ``synchronize()``.

    Communication: the constructor, ``step``, ``synchronize``, the end of ``join`` and
    ``state_dict(consolidated=True)`` are collective, all ranks in the same order. Everything else is local.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that does not need a closure. Only parameters that require a
            gradient now are exchanged.
        named_parameters: ``model.named_parameters()``, for messages and checkpoints; default: names
            ``parameter.<group>.<index>``.
        sketch: how to compress, a ``SketchConfig`` or a ``LowRankConfig``; None exchanges everything dense.
        transport: ``"torch"``, ``"horovod"``, ``"mpi"``, a :class:`~hvd_sketch.transport.Transport`, or ``"auto"``: the
            one that runs already, or that the job was started for; see
            :func:`~hvd_sketch.transport.resolve_transport`.
        backward_passes_per_step: how many backward passes may add up (a sum, as in Horovod) before a step. Taken
            and compared over the ranks; gradients add up until step() anyway.
        compression: the same as ``sketch``; or ``hvd.Compression.none`` or ``fp16``, for the part that goes dense.
        op: ``hvd.Average``, the default, or ``hvd.Sum``.
        gradient_predivide_factor: taken and without effect: means are made in float32 and do not overflow.
        num_groups, groups: taken and without effect: all tensors travel together.
        sparse_as_dense: hand sparse gradients, of rows, to the wrapped optimizer. They are exchanged as dense ones
            always.
        process_set: an ``hvd.ProcessSet`` to average over; a rank outside of it steps alone, and writes no log.
        check_every: steps after which the ranks compare a checksum of their parameters; also after the first step since
            a start. In all other steps they compare learning rates, momentum, betas and weight decays. 0: neither.
        max_skips: more skipped steps in a row, for which no ``GradScaler`` looks, are an error; 0: no limit.
        levels: 2: a dense mean inside of every host first, then the compressed exchange between one rank of each, which
            keeps the residuals; see :class:`~hvd_sketch.model.levels.TwoLevels`. 1: between all ranks.
        log: a file such as ``run.jsonl`` for a line about every step, which ``hvd-sketch report`` shows. Ranks other
            than 0 write ``run.rank1.jsonl`` and so on; those of other shards ``run.shard1.jsonl``,
            ``run.shard1.rank1.jsonl``. None: no file. Ranks may differ.
        trace: a file such as ``trace.json`` for the time of every part of a step; of ranks as for ``log``.
        tensorboard: a folder for TensorBoard's scalars, of rank 0.

    Attributes:
        inner: the wrapped optimizer.

    Raises:
        ValueError: on every rank: an optimizer that cannot be wrapped, names that do not fit it, parameters that
            cannot be exchanged, arguments that cannot be followed, on any of them; ranks that were set up differently.

    Source: Ivkin et al., Communication-efficient Distributed SGD with Sketching, NeurIPS 2019, Alg. 3.
    """

    # GradScaler would call step() only on ranks without Inf, and the others would wait for ever. So it calls
    # step() on all of them, with grad_scale and found_inf set as attributes.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[NamedParameter] | None = None,
        sketch: Compression | None = None,
        transport: str | Transport = "auto",
        backward_passes_per_step: int = 1,
        *,
        compression: Any = None,
        op: Any = None,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Any = None,
        sparse_as_dense: bool = False,
        process_set: Any = None,
        check_every: int = CHECK_EVERY,
        max_skips: int = 25,
        levels: Literal[1, 2] = 1,
        log: str | PathLike[str] | None = None,
        trace: str | PathLike[str] | None = None,
        tensorboard: str | PathLike[str] | None = None,
    ) -> None:
        sketch, compression = compression_of(sketch, compression)
        self._transport, sketch = transport_of(transport, process_set, sketch)
        self._is_outside = is_outside(process_set)
        horovod = HorovodArguments(compression, op, gradient_predivide_factor, num_groups, groups, sparse_as_dense)
        passes = {"backward_passes_per_step": (backward_passes_per_step, 1)}
        counts = {**passes, "check_every": (check_every, 0), "max_skips": (max_skips, 0)}
        with refused_together(self._transport):
            check_arguments(optimizer, sketch, horovod, counts)
            check_choice("levels", levels, (1, 2))
            named = name_parameters(optimizer, named_parameters)
            check_exchangeable(named)
            about = describe(optimizer, named, sketch) | {"levels": levels}
            if self._is_outside:
                log = trace = tensorboard = None
            shard = shard_number(named)
            outputs = outputs_of(self._transport, shard, about, log=log, trace=trace, tensorboard=tensorboard)
        told = {"wrapped by": "DistributedOptimizer", "levels": levels}
        compared = told | {name: value for name, (value, _) in counts.items()}
        require_equal(self._transport, compared | horovod.compared())
        require_equal_optimizers(self._transport, optimizer)
        super().__init__(optimizer)
        self._named = named
        self._parameters = [parameter for _, parameter in named]
        build = TwoLevels if levels == 2 else GradientExchange
        self._gradients = build(
            named,
            sketch,
            self._transport,
            wire_dtype=horovod.wire_dtype(),
            is_sum=horovod.is_sum(),
            makes_sparse=sparse_as_dense,
            check_every=check_every,
            max_skips=max_skips,
        )
        mark_sparse(optimizer, named, self._gradients.config)
        self._progress = Progress(self._parameters)
        self._write_to(outputs)
        if isinstance(self._transport, HorovodTransport):
            # hvd.broadcast_optimizer_state knows Horovod's own optimizers by their module. On ranks without a state it
            # calls step() of their base class, ForwardingOptimizer here; ours would wait for the other ranks.
            self.__dict__["__module__"] = "horovod.torch.optimizer"
        if sketch is not None and sketch.dense_below < ALL_DENSE and self._transport.rank == 0:
            warn_about_settings(optimizer, named, sketch)

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return self._progress.guarded(f"{type(self.inner).__name__}.{name}", method)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As Horovod's; without effect: gradients add up until ``step()``. Communication: none."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over all ranks, then step the wrapped optimizer, unless all ranks skip.

        Args:
            closure: evaluated once, with gradients enabled, before the exchange. The wrapped optimizer does not get it.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: inside ``skip_synchronize()`` with gradients that were not averaged before; with a
                GradScaler that has not unscaled what ``synchronize()`` averaged; on every rank: one cannot take the
                step, too many steps in a row were skipped, or parameters differ between ranks.

        Communication: collective, all ranks, unless ``synchronize()`` has exchanged these gradients already.
        Modifies ``p.grad`` (the averaged gradient), the residuals, the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._told_by_scaler() as (grad_scale, found_inf):
            if self._progress.awaits_step and grad_scale is not None:
                before = "scaler.step(optimizer)" if self._progress.in_backward else "optimizer.synchronize()"
                raise RuntimeError(
                    "the gradients that were averaged still carry the loss scale: call scaler.unscale_(optimizer) "
                    f"before {before}"
                )
            if self._progress.takes_averaged:
                is_taken = self._take_averaged(found_inf)
            else:
                is_taken = self._exchange(grad_scale, found_inf) and self._is_usable(found_inf)
            self._progress.start_over()
            self._progress.forgives = found_inf is not None
            if is_taken:
                self._step_inner(closure is not None)
            self._progress.note_step()
        return loss

    def _take_averaged(self, found_inf: Any) -> bool:
        """Whether ``synchronize()`` has left gradients that can be stepped with."""
        if not self._progress.awaits_step:
            raise RuntimeError(
                "step() inside skip_synchronize() found gradients that no synchronize() has averaged, and "
                "ranks would drift apart: call synchronize() after the last backward pass, or step() outside"
            )
        return bool(self._progress.exchanged) and self._is_usable(found_inf)

    def _is_usable(self, found_inf: Any) -> bool:
        """Whether averaged gradients can be stepped with, after a scaler has looked at them.

        What it found decides nothing by itself: it may have looked at this rank's gradients before they were averaged.
        """
        if found_inf is None or not float(found_inf):
            return True
        gradients = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        return all_finite([g.coalesce().values() if g.is_sparse else g for g in gradients])

    def _step_inner(self, has_closure: bool) -> None:
        self._put_back()
        try:
            self.inner.step()
        except Exception as error:
            if has_closure:
                error.add_note(
                    "DistributedOptimizer evaluates the closure itself, once, before the exchange, and steps "
                    f"{type(self.inner).__name__} without it: an optimizer that evaluates it by itself cannot be "
                    "exchanged. Call its own methods, each after optimizer.synchronize()"
                )
            raise

    def join(self) -> AbstractContextManager[None]:
        """Ranks with different numbers of batches::

            with optimizer.join():
                for batch in loader:
                    ...
                    optimizer.step()

        A rank that leaves the block goes on contributing gradients of zero, and what is left in its residual, until all
        have left theirs. The mean is over all ranks throughout, as in Horovod and in torch's ``Join``. At the end the
        ranks that left early get parameters and optimizer state from one that left last. Batches of a scheduler that is
        stepped after every one are not made up for: step it once an epoch, or equally often on every rank.

        Where the loop steps several optimizers, :func:`hvd_sketch.join` takes them together.

        Raises:
            ValueError: DDP's hook exchanges: ``model.join()`` is the one to use.

        Communication: collective at the end, all ranks. An exception inside leaves the other ranks to their launcher.
        """
        return join(self)

    def take_over_state(self, root_rank: int) -> None:
        """Take over from the root what belongs to no rank alone: see :func:`hvd_sketch.broadcast_optimizer_state`.

        Communication: collective, all ranks.
        """
        self._gradients.take_over_state(root_rank)

    def state_dict(self, *, consolidated: bool = False) -> dict[str, Any]:
        """The wrapped optimizer's dict, plus ``"hvd_sketch"``: momentum and residuals.

        Args:
            consolidated: False: this rank's own, so every rank saves its file; going on from them is bitwise.
                True: the mean over ranks, the same on each, to be loaded by every rank of a job of any size.

        Communication: none; with ``consolidated`` collective, all ranks.
        """
        if consolidated:
            self.catch_up_after_join(self._gradients.active)
        return {**self.inner.state_dict(), STATE_KEY: self._gradients.state_dict(consolidated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load either kind of :meth:`state_dict`, or a plain one of the wrapped optimizer (with a warning).

        Raises:
            ValueError: saved for other parameters, or one rank's own loaded at another rank or world size; an entry is
                missing, of another shape or dtype, or not finite. Then nothing has been taken over.

        Communication: none, but every rank loads the same kind.
        """
        saved = SavedState(state_dict, self._transport.rank)
        saved.entry("state", Mapping), saved.entry("param_groups", list)
        if ROUND_KEY in state_dict:
            raise ValueError(
                f"rank {self._transport.rank}: the state is one of LocalSteps, whose residuals are differences of "
                "parameters, not gradients: wrap the optimizer in LocalSteps, or go on from a checkpoint by "
                "load_checkpoint(residuals=False)"
            )
        has_ours = STATE_KEY in state_dict
        take_over = self._gradients.read_state(state_dict[STATE_KEY]) if has_ours else self._forget_residuals
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        take_over()
        self._progress.start_over()
        self._progress.note_step()

    def _forget_residuals(self) -> None:
        self._gradients.forget()
        if self.exchange is not None:
            logger.warning(
                "rank %d: the checkpoint has no %r entry (of a plain optimizer?): residuals start from zero",
                self._transport.rank,
                STATE_KEY,
            )

    def __repr__(self) -> str:
        at = f"rank {self._transport.rank} of {self._transport.size}"
        return f"{type(self).__name__}({at}, {self._gradients!r},\n{self.inner!r})"
