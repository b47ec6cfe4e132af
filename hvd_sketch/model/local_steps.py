"""LocalSteps: every rank trains by itself, and all exchange what has become of the parameters every H steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.checks import check_integer
from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import Report, all_finite
from hvd_sketch.exchange.saved import SavedState
from hvd_sketch.exchange.setup import refused_together, require_equal
from hvd_sketch.logs import outputs_of
from hvd_sketch.model.broadcast import broadcast_optimizer_state
from hvd_sketch.model.flat_parameters import separate_gradients
from hvd_sketch.model.forwarding import ForwardingOptimizer
from hvd_sketch.model.gradients import CHECK_EVERY, GradientExchange
from hvd_sketch.model.joining import join
from hvd_sketch.model.logged import LoggedOptimizer
from hvd_sketch.model.mesh import shard_number
from hvd_sketch.model.optimizer import ROUND_KEY, STATE_KEY
from hvd_sketch.model.parameters import NamedParameter, check_exchangeable, name_parameters
from hvd_sketch.model.routes import MakeExchange, make_exchange
from hvd_sketch.model.settings import require_equal_optimizers
from hvd_sketch.model.wrapping import describe, describe_optimizer, resolve_to_wrap, warn_about_settings
from hvd_sketch.observer import Kind
from hvd_sketch.shards import local
from hvd_sketch.transport import Transport

MakeOuter = Callable[[list[Tensor]], torch.optim.Optimizer]
logger = logging.getLogger(__name__)
# Better than without momentum and with DiLoCo's in trials on a character model, of which no record is kept.
nesterov = partial(torch.optim.SGD, lr=1.0, momentum=0.5, nesterov=True)


class LocalSteps(LoggedOptimizer):
    """A torch optimizer that every rank steps by itself; every H-th step the ranks exchange their parameters.

    A round begins with parameters ``start``, equal on all ranks. After H steps of the wrapped optimizer each rank's
    difference ``start - parameters`` goes through the exchange as a gradient would, with error feedback, and the outer
    optimizer steps from ``start`` with the mean. For networks that are too slow for an exchange in every step::

        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        compression = SketchConfig.for_wire_ratio(20, dim, ranks, candidates="nominate")
        optimizer = LocalSteps(inner, model.named_parameters(), compression, every=16)

    ``param_groups``, ``state``, ``defaults`` and hooks are the wrapped optimizer's own objects. Its state stays each
    rank's own. Buffers, such as batch norm's statistics, are not exchanged.

    If a difference is not finite on any rank, all ranks go back to ``start``, and the wrapped optimizer of that rank
    begins with a new state.

    With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` on every rank; the scales may differ, and a rank whose
    gradient overflows leaves out a step of its own.

    Memory, in bytes per parameter of float32: 4 for ``start``, or 2, 4 for residuals, 4 for an outer momentum.

    Communication: the constructor, every H-th ``step``, ``sync`` and the end of ``join`` are collective.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        named_parameters: ``model.named_parameters()``, for messages and checkpoints; default: numbered names.
        compression: a ``SketchConfig`` or a ``LowRankConfig``, without momentum and weight decay; None exchanges
            everything dense.
        transport: as for :class:`~hvd_sketch.DistributedOptimizer`.
        every: H, at least 1; equal on all ranks.
        outer: builds the outer optimizer from the parameters; default: SGD with a rate of 1 and Nesterov momentum of
            0.5. DiLoCo's is ``partial(SGD, lr=0.7, momentum=0.9, nesterov=True)``.
        start_device: where ``start`` is kept; default: beside the parameters.
        start_dtype: in which ``start`` is kept; default: the parameters'. With ``torch.bfloat16`` it takes half the
            memory, and every round begins with parameters that are rounded to it, alike on all ranks.
        check_every: exchanges after which the ranks compare a checksum of their parameters; in the others they compare
            the outer optimizer's learning rate and momentum. 0: neither.
        max_skips: more exchanges in a row that are not finite are an error; 0: no limit.
        log, trace, tensorboard: as for :class:`~hvd_sketch.DistributedOptimizer`. A step of these is an exchange, with
            the rank's own steps before it: their time, the means of what they logged, and the bytes of as many dense
            exchanges.

    Attributes:
        inner: the wrapped optimizer.
        outer: the outer one.
        every: H.

    Raises:
        ValueError: on every rank: an optimizer that cannot be wrapped, arguments that cannot be followed, ranks that
            were set up differently.

    Source: Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023.
    """

    _make: MakeExchange = staticmethod(make_exchange)  # builds the exchange of the large tensors
    _step_supports_amp_scaling = True  # a scaler calls step() also where this rank's gradient overflowed

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[NamedParameter] | None = None,
        compression: Compression | None = None,
        transport: str | Transport = "auto",
        *,
        every: int,
        outer: MakeOuter = nesterov,
        start_device: torch.device | str | None = None,
        start_dtype: torch.dtype | None = None,
        check_every: int = CHECK_EVERY,
        max_skips: int = 25,
        log: str | PathLike[str] | None = None,
        trace: str | PathLike[str] | None = None,
        tensorboard: str | PathLike[str] | None = None,
    ) -> None:
        self._transport = resolve_to_wrap(transport)
        counts = {"every": (every, 1), "check_every": (check_every, 0), "max_skips": (max_skips, 0)}
        with refused_together(self._transport):
            _check(optimizer, compression, counts, start_dtype)
            self._named = name_parameters(optimizer, named_parameters)
            check_exchangeable(self._named)
            self._parameters = [parameter for _, parameter in self._named]
            self.outer = outer(self._parameters)
            about = {"every": every, "outer optimizer": describe_optimizer(self.outer)}
            about = describe(optimizer, self._named, compression) | about
            shard = shard_number(self._named)
            outputs = outputs_of(self._transport, shard, about, log=log, trace=trace, tensorboard=tensorboard)
        super().__init__(optimizer)
        about_round = {"start_dtype": start_dtype, **{n: value for n, (value, _) in counts.items()}}
        require_equal(self._transport, {"wrapped by": "LocalSteps", **about_round})
        require_equal_optimizers(self._transport, self.outer, "outer optimizer")
        self._gradients = GradientExchange(
            self._named, compression, self._transport, check_every=check_every, max_skips=max_skips, make=self._make
        )
        self._write_to(outputs)
        self.every, self._round = every, _Round()
        where = {"device": start_device, "dtype": start_dtype}
        self._start = [torch.empty_like(p, **where) for p in self._parameters]  # type: ignore[arg-type]
        self._elements = sum(local(p).numel() for p in self._parameters)
        self._dense_bytes = sum(local(p).nbytes for p in self._parameters)
        if compression is not None and self._transport.rank == 0:
            warn_about_settings(self.outer, self._named, compression, every)

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        return method  # what a rank does inside of a round is its own affair

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer; after every H-th step :meth:`sync`. Returns what the wrapped optimizer returns.

        Communication: collective on every H-th call.
        """
        self.ledger.observer.begin_step()
        if self._round.done == 0:
            self._remember_start()
        loss = None
        with self._told_by_scaler() as (scale, found_inf):
            if found_inf is None or not float(found_inf):
                self._unscale(scale)
                loss = self.inner.step() if closure is None else self.inner.step(closure)
            self._round.done += 1
            self.ledger.add_local_step(self._elements, self._dense_bytes)
            if self._round.done >= self.every:
                self.sync()
        return loss

    @torch.no_grad()
    def sync(self) -> bool:
        """End a round now: exchange the differences, and step the outer optimizer. ``p.grad`` is None afterwards.

        Where no rank has stepped since the last exchange, nothing changes but ``p.grad``.

        Returns:
            Whether the round counts. False: it was thrown away.

        Raises:
            RuntimeError: on every rank, which are back where the round began: parameters were added or unfrozen on one,
                too many rounds in a row were thrown away, or parameters differ between ranks.

        Communication: collective, all ranks.
        """
        try:
            return self._exchange_differences()
        finally:  # also after an error: the ranks are back where the round began, and the next one begins
            self._round.done = 0
            for parameter in self._parameters:
                parameter.grad = None

    def _exchange_differences(self) -> bool:
        idle, is_finite = self._round.done == 0, True
        observer = self.ledger.observer
        report = Report(idle=idle, refusal=self._unregistered(), groups=self.outer.param_groups)
        if not idle:
            self.ledger.reopen_local_step(self._elements, self._dense_bytes)
        try:
            with observer.span(Kind.EXCHANGE, "exchange"):
                if not idle:
                    with observer.span(Kind.LOCAL, "differences"):
                        self._go_back()
                is_finite = idle or all_finite([local(p.grad) for p in self._parameters if p.grad is not None])
                counts = self._gradients.average(report)
        finally:
            if not is_finite:
                self._begin_anew()
        if not self._gradients.is_held:
            observer.end_step(self._gradients.step_number - 1, counts)
            if idle:
                self._remember_start()  # the others are back at theirs, in ``start_dtype``
            if counts:
                self.outer.step()
        return counts

    def join(self) -> AbstractContextManager[None]:
        """Ranks with different numbers of batches; see :meth:`hvd_sketch.DistributedOptimizer.join`.

        A rank that leaves the block ends its round. Then it contributes differences of zero until all have left, and
        gets the parameters and the outer optimizer's state of one that left last; the wrapped one's stays its own.

        Communication: collective at the end, all ranks.
        """
        return join(self)

    def end_round(self) -> None:
        """See :meth:`ExchangingOptimizer.end_round`: of a round that is under way. Communication: collective."""
        if self._round.done:
            self.sync()

    @property
    def _agreed(self) -> torch.optim.Optimizer:
        return self.outer

    def _remember_start(self) -> None:
        with torch.no_grad():
            for parameter, start in zip(self._parameters, self._start, strict=True):
                start.copy_(parameter)
                if start.dtype != parameter.dtype:
                    parameter.copy_(start)  # all ranks go on from what they will come back to

    def _go_back(self) -> None:
        """To where the round began; ``p.grad`` is what has become of the parameters since.

        Parameters that are frozen have no gradient, like those of which a backward pass makes none: neither what is
        left in residuals nor an outer momentum moves them.
        """
        for parameter, start in zip(self._parameters, self._start, strict=True):
            here = start.to(parameter.device, parameter.dtype)
            is_frozen = not parameter.requires_grad and torch.equal(local(here), local(parameter))
            parameter.grad = None if is_frozen else here - parameter
            parameter.copy_(here)

    def _unscale(self, scale: Any) -> None:
        if scale is None:
            return
        separate_gradients(self._parameters)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(float(scale))

    def _begin_anew(self) -> None:
        """A momentum that is NaN would spoil every round to come."""
        self.inner.state.clear()
        logger.warning(
            "rank %d: its parameters were NaN or infinite after %d steps. All ranks go back to where the round began, "
            "and %s begins with a new state on this rank. Lower the learning rate if it comes again.",
            *(self._transport.rank, self._round.done, type(self.inner).__name__),
        )

    def check_take_over(self, root_rank: int) -> None:
        """Raise ValueError within a round. Communication: none."""
        super().check_take_over(root_rank)
        if self._round.done:
            raise ValueError(
                f"within a round, after {self._round.done} of {self.every} steps, every rank has parameters of its "
                "own: call sync() before, also before a state is saved that one rank loads for all"
            )

    def take_over_state(self, root_rank: int) -> None:
        """Take over from the root what belongs to no rank alone: see :func:`hvd_sketch.broadcast_optimizer_state`.

        Raises:
            ValueError: on every rank: one is within a round.

        Communication: collective, all ranks.
        """
        with refused_together(self._transport, "take over a state"):
            self.check_take_over(root_rank)
        self._gradients.take_over_state(root_rank)
        broadcast_optimizer_state(self.outer, root_rank, self._transport)

    def state_dict(self, *, consolidated: bool = False) -> dict[str, Any]:
        """The wrapped optimizer's dict, with the outer one's, residuals, and in a round where it began.

        Args:
            consolidated: as for :class:`~hvd_sketch.DistributedOptimizer`; between rounds only. The wrapped optimizer's
                state is this rank's own.

        Raises:
            RuntimeError: ``consolidated`` within a round: the parameters differ between ranks.

        Communication: none; with ``consolidated`` collective, all ranks.
        """
        if consolidated and self._round.done:
            raise RuntimeError(
                f"rank {self._transport.rank}: a consolidated state is that of all ranks, and {self._round.done} of "
                f"{self.every} steps after an exchange they differ: call sync() on every rank before"
            )
        start = [tensor.clone() for tensor in self._start] if self._round.done else []
        a_round = {"outer": self.outer.state_dict(), "done": self._round.done, "start": start}
        return {**self.inner.state_dict(), STATE_KEY: self._gradients.state_dict(consolidated), ROUND_KEY: a_round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`. Within a round the rank's own parameters belong to it.

        Raises:
            ValueError: saved for other parameters, or by another class; an entry is missing or not what it must be.
                Then nothing has been taken over.

        Communication: none, but every rank loads the same kind.
        """
        saved = SavedState(state_dict, self._transport.rank)
        a_round = SavedState(saved.entry(ROUND_KEY, Mapping), self._transport.rank)
        done = a_round.count("done")
        starts = a_round.entry("start", list)
        if done >= self.every or len(starts) != (len(self._start) if done else 0):
            a_round.refuse("done", f"below every={self.every}, with a start for each parameter", done)
        numbered = SavedState({f"start {number}": value for number, value in enumerate(starts)}, self._transport.rank)
        for number in range(len(starts)):
            numbered.tensor(f"start {number}", self._start[number])
        take_over = self._gradients.read_state(saved.entry(STATE_KEY, Mapping))
        outer = self.outer.state_dict()
        self.outer.load_state_dict(a_round.entry("outer", Mapping))
        try:
            self.inner.load_state_dict({k: v for k, v in state_dict.items() if k not in (STATE_KEY, ROUND_KEY)})
        except Exception:
            self.outer.load_state_dict(outer)
            raise
        take_over()
        self._round.done = done
        for start, value in zip(self._start, starts, strict=False):
            start.copy_(value)

    def __repr__(self) -> str:
        at = f"rank {self._transport.rank} of {self._transport.size}, every {self.every} steps"
        return f"{type(self).__name__}({at}, {self._gradients!r},\n{self.inner!r},\nouter {self.outer!r})"


@dataclass
class _Round:
    """How many steps of it are done. An object of its own, for the reason that :class:`.progress.Progress` is one."""

    done: int = 0


def _check(
    optimizer: object, compression: object, counts: Mapping[str, tuple[object, int]], start_dtype: object
) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, ForwardingOptimizer) or hasattr(optimizer, "skip_synchronize"):
        raise ValueError("the optimizer exchanges already: wrap the plain torch optimizer, once")
    for name, (value, least) in counts.items():
        check_integer(name, value, least)
    if start_dtype is not None and not (isinstance(start_dtype, torch.dtype) and start_dtype.is_floating_point):
        raise ValueError(f"start_dtype must be a floating-point torch.dtype, or None, got {start_dtype!r}")
    if compression is None:
        return
    if not isinstance(compression, Compression):
        raise ValueError(f"compression must be a SketchConfig, a LowRankConfig, or None, got {compression!r:.100}")
    if compression.momentum:
        raise ValueError(
            f"compression must have no momentum, got {compression.momentum}: the outer optimizer has its own"
        )
    if compression.weight_decay:
        raise ValueError(
            f"compression must have no weight_decay, got {compression.weight_decay}: it would be added to differences "
            "of parameters, not to gradients. Give it to the wrapped optimizer"
        )
