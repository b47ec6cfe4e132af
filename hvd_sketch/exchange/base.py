"""What every exchange shares: an equal set-up, agreement before each step, the two halves of a step, its counters."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor

from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import Agreed, Gather, Loaded, Report, StepAgreement, agree_on_serial, all_finite
from hvd_sketch.exchange.feedback import Limits, no_limits
from hvd_sketch.exchange.saved import SavedState
from hvd_sketch.exchange.setup import require_equal
from hvd_sketch.hashing import HASH_VERSION
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.stall import watched

logger = logging.getLogger(__name__)
Parameters = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape, dtype
Ranges = Sequence[tuple[int, int]]  # coordinates from a start up to a stop; ascending, none of them empty


@dataclass(frozen=True)
class SparseUpdate:
    """What a step agreed on, the same bits on every rank.

    Attributes:
        indices: int64 [n], ascending. None: every coordinate, in order.
        values: float32 [n], the mean over ranks at ``indices``; finite.
        skipped: a rank's gradient was not finite: both tensors are empty.
    """

    indices: Tensor | None
    values: Tensor
    skipped: bool = False


class Options(TypedDict, total=False):
    """Keyword arguments of every exchange."""

    parameters: Parameters  # what the gradient is made of, compared over the ranks; default: nothing is said of it
    shapes: Sequence[tuple[int, ...]]  # of the tensors that make up the gradient; default: one vector
    dense_bytes: int  # size of the gradient in its own dtypes, for the ratio; default: 4 bytes a coordinate
    limits: Limits  # how large an element of the mean may be; default: what float32 holds
    name: Callable[[int], str]  # tells the name of a coordinate, for messages
    ledger: CommLedger  # to share one with another exchange; default: a new one
    max_skips: int  # more skipped steps in a row raise RuntimeError on every rank; default: 25; 0: no limit
    flags: int  # how many yes or no every rank tells before a step; default: one for each parameter


class Exchange(ABC):
    """Averages gradients over the ranks. The base of the sketched, the dense and any other exchange.

    A step has three parts::

        begin_step(report, gradient)     collective: is any gradient not finite? then all ranks skip the step
        accumulate(gradient)             local: momentum, residual, sketch
        agree() -> SparseUpdate          collective: the update, equal on all ranks

    Subclasses implement the last two, ``residual`` and ``velocity``, the state, and :meth:`_take_over`.

    Communication: the constructor is collective; it compares class, config, dim, parameters, world size and hash
    version over the ranks.

    Args:
        config: equal on all ranks.
        dim: length of the gradient.
        transport: this rank's end of the network.
        device: of the gradients and of all that is kept.
        **options: see :class:`Options`.

    Attributes:
        holds_gradient: ``accumulate`` keeps the gradient itself until ``agree``: it must stay untouched until then.
        dtype: of the gradient.
        agreement: the first collective of every step.
        reset_coordinates: how many of this rank's u and v were not finite and were set to zero.

    Raises:
        ValueError: on every rank: they were set up differently.
    """

    holds_gradient: ClassVar[bool] = False

    def __init__(
        self,
        config: Compression | None,
        dim: int,
        transport: Transport,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        parameters, max_skips = options.get("parameters", ()), options.get("max_skips", 25)
        shapes = options.get("shapes", ())
        _require_equal_setup(transport, type(self).__name__, config, dim, parameters, shapes, max_skips)
        self.dim = dim
        self.dtype = torch.float32
        self.ledger = options.get("ledger", CommLedger())
        flags = options.get("flags", len(parameters))
        self.agreement = StepAgreement(transport.size, flags, max_skips, agree_on_serial(transport))
        self.reset_coordinates = 0
        self._step = 0
        self._is_fresh = True  # has neither made a step nor loaded a state
        self._loaded = Loaded.NOTHING
        self._device = torch.device(device)
        self._dense_bytes = options.get("dense_bytes", 4 * dim)
        self._limits = options.get("limits", no_limits(dim, device))
        self._name = options.get("name", "coordinate {}".format)
        self._transport = transport
        self._comm = MeteredTransport(transport, self.ledger, config is not None and config.deterministic)

    @property
    @abstractmethod
    def residual(self) -> Tensor:
        """What this rank produced and has not sent yet, [dim]."""

    @property
    @abstractmethod
    def velocity(self) -> Tensor:
        """The momentum, [dim]."""

    @property
    def step_number(self) -> int:
        """Number of the step that comes next, from 0."""
        return self._step

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite."""
        return self.agreement.skipped_steps

    def step(self, gradient: Tensor | Sequence[Tensor], finite: bool = True) -> SparseUpdate:
        """Exchange one gradient: :meth:`begin_step`, :meth:`accumulate`, :meth:`agree`.

        Args:
            gradient: ``dtype`` [dim], this rank's, or consecutive slices of it; not modified.
            finite: False if this rank found anything else not finite that belongs to the step.

        Returns:
            The mean over ranks at the coordinates that were exchanged.

        Communication: collective.
        """
        slices = [gradient] if isinstance(gradient, Tensor) else list(gradient)
        if not self.begin_step(self._report_of(slices, finite), slices).goes_on:
            self.count_step()
            return self._nothing()
        self.accumulate(slices)
        return self.agree()

    def begin_step(self, report: Report, gradient: Sequence[Tensor] = (), unused: Ranges = ()) -> Agreed:
        """Agree on a step: whether all take it, and from which state.

        Args:
            report: what this rank knows.
            gradient: what :meth:`accumulate` will get, where it has not had it yet, so that what is to be sent of it
                can travel with the report; not modified. Empty: nothing is known of it.
            unused: coordinates that this rank has no gradient of.

        Communication: collective.
        """
        may_take_no_step = report.done or report.held or report.idle
        if not may_take_no_step:
            self.ledger.begin_step()
        report = replace(report, fresh=self._is_fresh, loaded=self._loaded)
        gather = self._gather_reports(report, gradient, unused)
        agreed = self.agreement.agree(self._comm, self._step, report, gather)
        if agreed.root is not None:
            self.take_over_state(agreed.root)
        if may_take_no_step and agreed.active and not agreed.held:
            self.ledger.begin_step()
        return agreed

    def _gather_reports(self, report: Report, gradient: Sequence[Tensor], unused: Ranges) -> Gather | None:
        """A collective of the exchange's own that carries the report, too; None: it travels alone.

        Which it is must be equal on all ranks, and u and v must stay as they are.
        """
        return None

    @abstractmethod
    def accumulate(self, gradient: Sequence[Tensor], unused: Ranges = ()) -> None:
        """The local half of a step: take this rank's gradient in.

        Args:
            gradient: ``dtype``, consecutive slices of [dim]; not modified. Finite on every rank.
            unused: coordinates that no rank has a gradient of, equal on all ranks. Their u and v stay as they are, and
                nothing of them is sent.

        Communication: none.
        """

    @abstractmethod
    def agree(self) -> SparseUpdate:
        """The collective half of a step: the update, equal on all ranks. Communication: collective."""

    def count_step(self) -> None:
        """A step is over, taken or skipped: the next one has new hashes. Communication: none."""
        self._step += 1
        self._is_fresh, self._loaded = False, Loaded.NOTHING

    def take_over_state(self, root: int) -> None:
        """Give all ranks the root's counters and what else a rank may take over from another.

        Residuals belong to their rank. All get the root's only where it has just loaded those of a
        ``state_dict(consolidated=True)``. Otherwise a rank keeps its own if it is at the root's step, and begins with
        zeros if it is at another.

        Communication: collective, all ranks (not counted in the ledger).
        """
        counters = torch.tensor(
            [self._step, self.agreement.skipped_steps, self._loaded, *self._predictions()], device="cpu"
        )
        own_step = self._step
        with watched(self._transport, "take over a state"):
            step, skipped, loaded, *predictions = self._transport.broadcast_(counters.to(torch.int64), root).tolist()
            self._step, self.agreement.skipped_steps = step, skipped
            self._is_fresh, self._loaded = self._is_fresh and step == 0, Loaded(loaded)
            self._take_over(root, self._loaded == Loaded.CONSOLIDATED, own_step == step, predictions)

    def forget(self) -> None:
        """Momentum and residuals start from zero, as after loading the state of an optimizer without an exchange.

        Communication: none, but every rank forgets.
        """
        self.residual.zero_()
        self.velocity.zero_()
        if not self._is_fresh:
            self._loaded = Loaded.PLAIN

    @abstractmethod
    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """What is needed to go on.

        Args:
            consolidated: False: this rank's own, to be loaded by the same rank of a job of the same size; going
                on from it is bitwise. True: the mean of u and v over ranks, equal everywhere, to be loaded by
                every rank of a job of any size; the averaged update that is still to come stays the same.

        Communication: none, or collective with ``consolidated`` (not counted in the ledger).
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; every rank must load the same kind. Communication: none.

        Raises:
            ValueError: it is of another dim, or it is one rank's own and this is another rank or world size; an entry
                is missing, of another shape or dtype, or not finite. Then nothing has been taken over.
        """
        self.read_state(state)()

    @abstractmethod
    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state as :meth:`load_state_dict` does; the function returned takes it over, and cannot fail."""

    def _predictions(self) -> list[int]:
        """What saves messages in the next step."""
        return []

    @abstractmethod
    def _take_over(self, root: int, consolidated: bool, at_same_step: bool, predictions: list[int]) -> None:
        """What :meth:`take_over_state` does beside the counters. Communication: collective."""

    def _report_of(self, gradient: Sequence[Tensor], finite: bool) -> Report:
        """What this rank can say of consecutive slices of its gradient."""
        kind = self.dtype, 1, torch.strided, self._device.type
        fits = all((values.dtype, values.ndim, values.layout, values.device.type) == kind for values in gradient)
        if fits and sum(map(len, gradient)) == self.dim:
            return Report(finite=finite and all_finite(gradient))
        arrived = ", ".join(
            f"{values.dtype} of {tuple(values.shape)}, {values.layout}, on {values.device}" for values in gradient[:5]
        )
        expected = str(self.dtype).removeprefix("torch.")
        return Report(
            refusal=ValueError(
                f"the gradient must be {expected} of shape ({self.dim},), dense and on {self._device.type}, or slices "
                f"of it in order, got {arrived}"
            )
        )

    def _nothing(self) -> SparseUpdate:
        indices = torch.empty(0, dtype=torch.int64, device=self._device)
        return SparseUpdate(indices, torch.empty(0, dtype=torch.float32, device=self._device), skipped=True)

    def _count_reset(self, coordinates: Tensor) -> None:
        """Count coordinates whose u or v was not finite, and name the first ones once."""
        if not coordinates.numel():
            return
        if not self.reset_coordinates:
            named = ", ".join(self._name(number) for number in coordinates[:5].tolist())
            # No warning of Python's: one that is made an error would stop this rank in the middle of a step.
            logger.warning(
                "rank %d: momentum or residual was NaN or infinite at %d coordinates (%s) and starts from zero there: "
                "the gradient overflowed float32. Further ones are only counted (reset_coordinates).",
                *(self._comm.rank, coordinates.numel(), named + ", …" * (coordinates.numel() > 5)),
            )
        self.reset_coordinates += coordinates.numel()

    def _counters(self, rank: int | None) -> dict[str, Any]:
        """What every state holds; ``rank`` is None where any rank may load it."""
        of = {"dim": self.dim, "rank": rank, "size": self._comm.size}
        return {**of, "step": self._step, "skipped_steps": self.skipped_steps}

    def _load_counters(self, saved: SavedState) -> None:
        """Take over what :meth:`_counters` gave, checked by :meth:`_saved`."""
        self._step = saved.count("step")
        self.agreement.skipped_steps = saved.count("skipped_steps")
        self._is_fresh = self._is_fresh and self._step == 0  # its own, as Accelerate loads what it was given
        self._loaded = Loaded.CONSOLIDATED if saved.entry("rank") is None else Loaded.OWN

    def _saved(self, state: Mapping[str, Any]) -> SavedState:
        """Refuse a state of another dim, or one rank's own on another rank or at another world size."""
        rank, size = self._comm.rank, self._comm.size
        saved = SavedState(state, rank, self._name)
        if saved.count("dim") != self.dim:
            raise ValueError(f"rank {rank}: the saved state is of dim {state['dim']}, this exchange of dim {self.dim}")
        if saved.entry("rank") is not None and (saved.count("rank"), saved.count("size")) != (rank, size):
            raise ValueError(
                f"the saved state is of rank {state['rank']} of {state['size']}, this is rank {rank} of {size}: load "
                "each rank's own, or save with state_dict(consolidated=True) to change the world size. For frameworks "
                "that save rank 0's alone: docs/integrations.md"
            )
        saved.count("step"), saved.count("skipped_steps")
        return saved


def _require_equal_setup(
    transport: Transport,
    kind: str,
    config: Compression | None,
    dim: int,
    parameters: Parameters,
    shapes: Sequence[Sequence[int]],
    max_skips: int,
) -> None:
    fields: dict[str, object] = {"exchange": kind, "hash version": HASH_VERSION}
    fields |= {"world size": transport.size, "dim": dim}
    settings = asdict(config) if config is not None else {"cols": "none: dense"}
    fields |= {f"config.{name}": value for name, value in settings.items()}
    fields |= {"max_skips": max_skips, "shapes": " ".join(str(tuple(shape)) for shape in shapes)}
    fields |= {f"parameter {i}": " ".join(map(str, parameter)) for i, parameter in enumerate(parameters)}
    require_equal(transport, fields)
