"""DistributedOptimizer: gradients in, sparse averaged gradients out, then the user's optimizer steps."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvd_sketch.agreement import refused_together, require_equal
from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange import SketchedAllreduce
from hvd_sketch.gradients import GradientExchange
from hvd_sketch.packing import NamedParameter, check_exchangeable, name_parameters
from hvd_sketch.transport import Transport, resolve_transport
from hvd_sketch.volume import CommLedger

STATE_KEY = "hvd_sketch"
WRAP_ANEW = (
    "give the inner optimizer all its parameters first, with requires_grad set, and wrap it then; to change "
    "them later, wrap it anew"
)
logger = logging.getLogger(__name__)


def _of_inner(name: str) -> Any:
    # Looked up each time: load_state_dict gives the inner optimizer new objects.
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


class DistributedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose ``step()`` first averages the gradients over all ranks, sketched.

    ``param_groups``, ``state``, ``defaults`` and hooks are the wrapped optimizer's own objects, so
    learning-rate schedulers may be attached to either. A step whose gradient is not finite on any rank is
    skipped on all: parameters, ``p.grad``, momentum and residuals stay as they were, and it is counted.

    With ``torch.amp.GradScaler`` call ``scaler.step(optimizer)`` on every rank; the scales may differ. To
    clip averaged gradients, ``scaler.unscale_(optimizer)`` comes before ``synchronize()``.

    Communication: the constructor, ``step``, ``synchronize`` and ``state_dict(consolidated=True)`` are
    collective, all ranks in the same order. Everything else is local.

    Args:
        optimizer: any ``torch.optim.Optimizer`` but LBFGS and SparseAdam. Only parameters that require a
            gradient are exchanged.
        named_parameters: ``model.named_parameters()``, for messages and checkpoints; default: names
            ``parameter.<group>.<index>``.
        sketch: how to compress; None exchanges everything dense and adds no momentum.
        transport: ``"horovod"``, ``"mpi"`` or a :class:`~hvd_sketch.transport.Transport`.
        backward_passes_per_step: how many backward passes may add up (a sum, as in Horovod) before a step.

    Attributes:
        inner: the wrapped optimizer.

    Raises:
        ValueError: on every rank: an optimizer that cannot be wrapped, names that do not fit it, parameters that
            cannot be exchanged, on any of them; ranks that were set up differently.

    Source: Ivkin et al., Communication-efficient Distributed SGD with Sketching, NeurIPS 2019, Alg. 3.
    """

    # GradScaler would call step() only on ranks without Inf, and the others would wait for ever. So it calls
    # step() on all of them, with grad_scale and found_inf set as attributes.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[NamedParameter] | None = None,
        sketch: SketchConfig | None = None,
        transport: str | Transport = "horovod",
        backward_passes_per_step: int = 1,
    ) -> None:
        # Not super().__init__: it would make param_groups, state and hooks of our own.
        self._transport = resolve_transport(transport)
        with refused_together(self._transport):
            _check_arguments(optimizer, sketch, backward_passes_per_step)
            named = name_parameters(optimizer, named_parameters)
            check_exchangeable(named)
        require_equal(self._transport, {"backward_passes_per_step": backward_passes_per_step})
        self.inner = optimizer
        self._gradients = GradientExchange(named, sketch, self._transport)
        self._passes = BackwardCounter(named, backward_passes_per_step, self._gradients.gradient_is_ready)
        self._known = {id(parameter) for _, parameter in named}
        self._exchanged: bool | None = None  # of p.grad: None not yet, True averaged, False skipped
        self._skip_synchronize = False
        self._warned_exchanged = False
        if sketch is not None and self._transport.rank == 0:
            _warn_about_settings(optimizer, sketch, self._gradients.sketched is None)

    param_groups = _of_inner("param_groups")
    state = _of_inner("state")
    defaults = _of_inner("defaults")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    @property
    def exchange(self) -> SketchedAllreduce | None:
        """The sketched exchange, with ``residual`` and ``velocity``; None where nothing is sketched."""
        return self._gradients.sketched

    @property
    def ledger(self) -> CommLedger:
        """Every byte that steps handed to the network, sketched and dense."""
        return self._gradients.ledger

    @property
    def skipped_steps(self) -> int:
        """How many exchanges all ranks skipped because something was not finite."""
        return self._gradients.skipped_steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also starts counting backward passes anew. Communication: none."""
        self.inner.zero_grad(set_to_none=set_to_none)
        self._start_over()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over all ranks, then step the wrapped optimizer, unless all ranks skip.

        Args:
            closure: evaluated once, with gradients enabled, before the exchange.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: inside ``skip_synchronize()`` with gradients that were not averaged before; with a
                GradScaler that has not unscaled what ``synchronize()`` averaged.

        Communication: collective, all ranks, unless ``synchronize()`` has exchanged these gradients already.
        Modifies ``p.grad`` (the averaged gradient), the residuals, the parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # From our own attributes only: a fused inner optimizer may have such attributes for itself.
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        finite = found_inf is None or not float(found_inf)
        if self._must_exchange():
            exchanged = self._exchange(grad_scale, finite)
        elif grad_scale is not None:
            raise RuntimeError(
                "synchronize() averaged gradients that still carry the loss scale: call "
                "scaler.unscale_(optimizer) before optimizer.synchronize()"
            )
        else:
            # Averaged gradients are equal on all ranks, and so is what the scaler found in them.
            exchanged = bool(self._exchanged) and finite
        self._start_over()
        if exchanged:
            self.inner.step()
        return loss

    def synchronize(self) -> None:
        """Average the gradients now, so that they can be clipped before ``step()``, as in Horovod::

            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()

        With a GradScaler, ``scaler.unscale_(optimizer)`` comes first: residuals outlive the loss scale.

        Communication: collective, all ranks. Modifies ``p.grad`` and the residuals.
        """
        if self._holds_exchanged():
            self._warn_exchanged("synchronize() was called twice for the same gradients")
            return
        self._exchanged = self._exchange(None, True)
        self._passes.reset()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside, ``step()`` takes the gradients as ``synchronize()`` left them."""
        self._skip_synchronize = True
        try:
            yield
        finally:
            self._skip_synchronize = False

    def _holds_exchanged(self) -> bool:
        return self._exchanged is not None and not self._passes.any()

    def _must_exchange(self) -> bool:
        if self._holds_exchanged():
            if not self._skip_synchronize:
                self._warn_exchanged("step() was called after synchronize() without skip_synchronize()")
            return False
        if self._skip_synchronize:
            raise RuntimeError(
                "step() inside skip_synchronize() found gradients that no synchronize() has averaged, and "
                "ranks would drift apart: call synchronize() after the last backward pass, or step() outside"
            )
        return True

    def _warn_exchanged(self, what: str) -> None:
        if not self._warned_exchanged and self._transport.rank == 0:
            logger.warning("%s: the gradients are averaged already and are not exchanged again", what)
        self._warned_exchanged = True

    def _start_over(self) -> None:
        self._exchanged = None
        self._passes.reset()
        self._gradients.gradients_are_void()

    def _exchange(self, grad_scale: Any, finite: bool) -> bool:
        """Average all gradients into ``p.grad``; False when all ranks skip."""
        strangers = [
            f"parameter.{i}.{j}"
            for i, group in enumerate(self.param_groups)
            for j, parameter in enumerate(group["params"])
            if parameter.requires_grad and id(parameter) not in self._known
        ]
        if strangers:
            raise RuntimeError(
                f"{', '.join(strangers[:5])} came to the optimizer, or began to require a gradient, after "
                f"wrapping, and would drift apart between ranks: {WRAP_ANEW}"
            )
        if grad_scale is None:
            return self._gradients.average(None, finite)
        return self._gradients.average(torch.as_tensor(grad_scale).double().reciprocal().float(), finite)

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: residuals and buffers are laid out at construction."""
        raise RuntimeError(f"parameters cannot be added to a DistributedOptimizer: {WRAP_ANEW}")

    def state_dict(self, *, consolidated: bool = False) -> dict[str, Any]:
        """The wrapped optimizer's dict, plus ``"hvd_sketch"``: momentum and residuals.

        Args:
            consolidated: False: this rank's own, so every rank saves its file; going on from them is bitwise.
                True: the mean over ranks, the same on each, to be loaded by every rank of a job of any size.

        Communication: none; with ``consolidated`` collective, all ranks.
        """
        return {**self.inner.state_dict(), STATE_KEY: self._gradients.state_dict(consolidated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load either kind of :meth:`state_dict`, or a plain one of the wrapped optimizer (with a warning).

        Raises:
            ValueError: saved for other parameters, or one rank's own loaded at another rank or world size.

        Communication: none, but every rank loads the same kind.
        """
        if STATE_KEY in state_dict:
            self._gradients.load_state_dict(state_dict[STATE_KEY])
        else:
            self._forget_residuals()
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._start_over()

    def _forget_residuals(self) -> None:
        for part in (self._gradients.sketched, self._gradients.dense):
            if part is not None:
                part.residual.zero_()
                part.velocity.zero_()
        if self.exchange is not None:
            logger.warning(
                "rank %d: the checkpoint has no %r entry (of a plain optimizer?): residuals start from zero",
                self._transport.rank,
                STATE_KEY,
            )

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a DistributedOptimizer holds its rank's network and cannot be copied or pickled: save "
            "state_dict() and load it into a new one"
        )

    def __repr__(self) -> str:
        at = f"rank {self._transport.rank} of {self._transport.size}"
        return f"{type(self).__name__}({at}, {self._gradients!r},\n{self.inner!r})"


class BackwardCounter:
    """Counts each parameter's backward passes since the last step and refuses more than ``limit``.

    Calls ``ready`` with every parameter whose last pass has come.
    """

    def __init__(self, named: Sequence[NamedParameter], limit: int, ready: Callable[[Tensor], None]) -> None:
        self._limit = limit
        self._ready = ready
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
        """One more pass reached a parameter. Raises RuntimeError beyond the limit."""
        self._counts[name] = self._counts.get(name, 0) + 1
        if self._counts[name] > self._limit:
            raise RuntimeError(
                f"{self._counts[name]} backward passes reached {name!r} since the last step, expected at "
                f"most backward_passes_per_step={self._limit}: raise it to add up gradients, or call step() "
                f"or the optimizer's zero_grad() in between"
            )
        if self._counts[name] == self._limit:
            self._ready(parameter)


def _count(counter: weakref.ref[BackwardCounter], name: str, parameter: Tensor) -> None:
    alive = counter()
    if alive is not None:
        alive.count(name, parameter)


def _check_arguments(optimizer: object, sketch: object, backward_passes_per_step: object) -> None:
    _check_wrappable(optimizer)
    if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be an integer of at least 1, got {backward_passes_per_step!r}")
    if sketch is not None and not isinstance(sketch, SketchConfig):
        raise ValueError(f"sketch must be a SketchConfig, or None for dense, got {type(sketch).__name__}")


def _check_wrappable(optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if hasattr(optimizer, "skip_synchronize"):
        raise ValueError("the optimizer exchanges gradients already: wrap the plain torch optimizer, once")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure several times per step, each with gradients of its own to exchange, "
            "which one exchange cannot give: use a first-order optimizer such as SGD or AdamW"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("SparseAdam takes sparse p.grad only, averaged gradients are dense: use Adam")


def _warn_about_settings(optimizer: torch.optim.Optimizer, sketch: SketchConfig, all_dense: bool) -> None:
    groups = optimizer.param_groups
    if all_dense:
        logger.warning(
            "all tensors have at most one dimension or fewer than dense_below=%d elements: nothing is "
            "sketched, gradients are exchanged dense. Lower dense_below to sketch them.",
            sketch.dense_below,
        )
    momentum = max(float(g.get("momentum") or g.get("betas", (0,))[0]) for g in groups)
    if momentum > 0 and sketch.momentum > 0:
        logger.warning(
            "momentum is applied twice: %s has %g and the sketch %g. Set one of them to 0.",
            *(type(optimizer).__name__, momentum, sketch.momentum),
        )
    decay = max(float(g.get("weight_decay") or 0) for g in groups)
    if decay > 0 and sketch.weight_decay > 0:
        logger.warning(
            "weight decay is applied twice: %s has %g and the sketch %g. Set one of them to 0.",
            *(type(optimizer).__name__, decay, sketch.weight_decay),
        )
