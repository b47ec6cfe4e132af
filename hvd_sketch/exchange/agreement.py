"""What all ranks must agree on before each step: whether and how all of them take it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from itertools import count

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.exchange.setup import tell_values
from hvd_sketch.transport.base import Transport, gather_texts, name_ranks
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.wire_bytes import COUNTER_BITS, counter_words

# A rank's word in the first collective of a step: flags in the lowest bits, then which exchange, the step, the digest.
FLAG_BITS = 11
SERIAL_BITS = 8
STEP_BITS = 27
DIGEST_BITS = 17
LOADED_SHIFT = 8  # of a flag
_serials = count()  # of the exchanges of this process

# From this rank's words, int64 [n], to all ranks', int64 [ranks, n]. Communication: collective.
Gather = Callable[[Tensor], Tensor]


class Flag(IntFlag):
    """What one rank says of itself before a step."""

    ARRIVED = 1  # a rank that has left by hvd.join() adds zeros
    NOT_FINITE = 2
    SCALED = 4  # a GradScaler judges this step, too, and looks for its scale by overflows
    DONE = 8  # has run out of data and contributes nothing; with HELD: has nothing new, but goes on
    FRESH = 16  # has neither made a step nor loaded a state
    REFUSED = 32  # cannot take this step
    HELD = 64  # its gradients are averaged already
    FORGIVES = 128  # a GradScaler has judged the skipped step before
    LOADED = 768  # two bits: what kind of state it has loaded since its last step
    PARAMETERS = 1024  # the digest is of its parameters; without: of its optimizer's settings


class Loaded(IntEnum):
    """What kind of state a rank has loaded since its last step."""

    NOTHING = 0
    OWN = 1
    CONSOLIDATED = 2
    PLAIN = 3  # of an optimizer without an exchange


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank knows before a step that the others do not."""

    finite: bool = True  # nothing of its gradient is NaN or infinite
    scaled: bool = False  # a GradScaler judges this step, too
    done: bool = False  # it has run out of data
    idle: bool = False  # it has made no step since the last exchange: if all ranks say so, nothing is to be exchanged
    fresh: bool = False  # it has neither made a step nor loaded a state
    refusal: Exception | None = None  # what it raises because it cannot take this step
    held: bool = False  # its gradients are averaged already: if all ranks say so, nothing is to be exchanged
    forgives: bool = False  # a GradScaler has judged the skipped step before
    loaded: Loaded = Loaded.NOTHING  # what kind of state it has loaded since its last step
    used: Sequence[bool] = ()  # for each parameter whether it has a gradient here
    groups: Sequence[Mapping[str, object]] = ()  # of its optimizer, for their settings; none: these are not compared
    was_unused: bool = False  # it made no step with what the last exchange has averaged; compared with the settings
    digest: int = 0  # of its parameters' bits, or else of its settings, DIGEST_BITS wide and not 0; 0: not made
    of_parameters: bool = False  # what the digest is of

    def flags(self) -> Flag:
        flags = Flag.ARRIVED | Flag(self.loaded << LOADED_SHIFT)
        for is_set, flag in (
            (not self.finite, Flag.NOT_FINITE),
            (self.scaled, Flag.SCALED),
            (self.done, Flag.DONE),
            (self.idle, Flag.DONE | Flag.HELD),
            (self.fresh, Flag.FRESH),
            (self.refusal is not None, Flag.REFUSED),
            (self.held, Flag.HELD),
            (self.forgives, Flag.FORGIVES),
            (self.of_parameters, Flag.PARAMETERS),
        ):
            flags |= flag if is_set else Flag(0)
        return flags


@dataclass(frozen=True)
class Agreed:
    """What all ranks know before they go on with a step, equal on every rank."""

    goes_on: bool  # False: all ranks skip the step, have nothing to exchange, or have run out of data
    held: bool  # all ranks that have data hold averaged gradients, or have nothing new
    active: tuple[int, ...]  # the ranks that still have data
    used: tuple[bool, ...]  # for each parameter whether any rank has a gradient of it
    compared: bool  # every rank has made a digest of its parameters
    drifted: bool  # the digests differ
    settings_differ: bool  # every rank has made a digest of its optimizer's settings, and they differ
    root: int | None  # a rank with a loaded state for the fresh ranks to take over; None: none is fresh, or all are


class StepAgreement:
    """The first collective of every step.

    Args:
        size: how many ranks there are.
        parameters: how many parameters a report tells of.
        max_skips: more skipped steps in a row are an error; 0: never. Steps that a ``GradScaler`` judges do not count.
        serial: which exchange of these ranks takes the steps, equal on all of them; see :func:`agree_on_serial`.
    """

    def __init__(self, size: int, parameters: int = 0, max_skips: int = 25, serial: int = 0) -> None:
        self.skipped_steps = 0
        self._serial = serial % (1 << SERIAL_BITS)
        self._max_skips = max_skips
        self._in_a_row = 0
        self._warned = False
        self._counters = _Counters(size, parameters)

    def agree(self, comm: MeteredTransport, step: int, report: Report, gather: Gather | None = None) -> Agreed:
        """Tell the others this rank's report and learn theirs.

        Communication: one tiny allreduce, of 8 bytes for each rank and a few bits for each parameter; or what
        ``gather`` does, in the phase of the caller.

        Raises:
            RuntimeError: on every rank: one refuses the step (and raises its refusal itself), has left by
                ``hvd.join()``, takes the step of another exchange, or is at another step, whose hashes do not fit; too
                many steps in a row were skipped.
        """
        own = torch.zeros(1 + self._counters.words, dtype=torch.int64, device="cpu")
        # An int: of a Flag with a step in it, enum keeps every value for ever, 300 bytes a step.
        numbers = (report.digest << STEP_BITS | step) << SERIAL_BITS | self._serial
        own[0] = numbers << FLAG_BITS | int(report.flags())
        self._counters.fill(own[1:], report.used)
        if gather is None:
            words = torch.zeros(comm.size + self._counters.words, dtype=torch.int64, device="cpu")
            words[comm.rank], words[comm.size :] = own[0], own[1:]
            with comm.phase("agree"):
                sums = comm.allreduce_(words)
            firsts, counters = sums[: comm.size], sums[comm.size :]
        else:
            words = gather(own)
            firsts, counters = words[:, 0].contiguous(), words[:, 1:].sum(0)
        every = _Words(firsts)
        _refuse_together(comm, every, report.refusal)
        _check_joined(comm, every)
        _check_same_exchange(every)
        held = _all_hold(every)
        root = _state_root(every)
        if every.saying(Flag.FORGIVES):
            self._in_a_row = 0
        of_parameters = len(every.saying(Flag.PARAMETERS))
        have_digests = bool(every.digests.all())
        differ = have_digests and bool((every.digests != every.digests[0]).any())
        return Agreed(
            goes_on=self._judge(every),
            held=held,
            active=tuple(every.having_data()),
            used=self._counters.read(counters),
            compared=have_digests and of_parameters == comm.size,
            drifted=differ and of_parameters == comm.size,
            settings_differ=differ and not of_parameters,
            root=root,
        )

    def _judge(self, every: _Words) -> bool:
        if not every.not_saying(Flag.DONE | Flag.HELD):
            return False
        bad_ranks = every.saying(Flag.NOT_FINITE)
        if bad_ranks:
            self._count_skip(bad_ranks, set(bad_ranks) <= set(every.saying(Flag.SCALED)))
            return False
        self._in_a_row = 0
        return True

    def _count_skip(self, bad_ranks: list[int], scaled: bool) -> None:
        reason = f"the gradient of {name_ranks(bad_ranks)} has NaN or Inf"
        self.skipped_steps += 1
        self._in_a_row = 0 if scaled else self._in_a_row + 1
        if self._max_skips and self._in_a_row > self._max_skips:
            raise RuntimeError(
                f"all ranks skipped {self._in_a_row} steps in a row, the last because {reason}: the model has "
                "diverged, or its data hold NaN. Lower the learning rate, go back to a checkpoint, or raise "
                f"max_skips={self._max_skips} (0: no limit)"
            )
        if not self._warned:
            warnings.warn(
                f"all ranks skip this step: {reason}. Parameters, momentum and residuals stay as they are. "
                "Further skips are only counted (skipped_steps).",
                RuntimeWarning,
                stacklevel=_users_level(),
            )
        self._warned = True


def _users_level() -> int:
    """The ``stacklevel`` of the first caller outside of this package and torch, for a warning by who calls this."""
    frame, level = sys._getframe(1), 1
    ours = __name__.partition(".")[0], "torch"
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level


def agree_on_serial(comm: Transport) -> int:
    """A number that tells an exchange from the others of its ranks: how many rank 0 had made.

    Communication: collective: a broadcast of 8 bytes.
    """
    return int(comm.broadcast_(torch.tensor([next(_serials)], device="cpu"), 0))


class _Words:
    """What all ranks say, in rank order; vectors, because a Python object for each of 256 ranks takes 20 ms.

    Attributes:
        flags, serials, steps, digests: int64 [ranks].
    """

    def __init__(self, words: Tensor) -> None:
        numbers = words.numpy()
        self.flags = numbers & (1 << FLAG_BITS) - 1
        self.serials = (numbers >> FLAG_BITS) & (1 << SERIAL_BITS) - 1
        self.steps = (numbers >> FLAG_BITS + SERIAL_BITS) & (1 << STEP_BITS) - 1
        self.digests = numbers >> FLAG_BITS + SERIAL_BITS + STEP_BITS

    def saying(self, flags: Flag) -> list[int]:
        """The ranks that set any of some flags."""
        return np.flatnonzero(self.flags & int(flags)).tolist()

    def not_saying(self, flags: Flag) -> list[int]:
        """The ranks that set none of some flags."""
        return np.flatnonzero(self.flags & int(flags) == 0).tolist()

    def having_data(self) -> list[int]:
        """The ranks that have not run out of data."""
        return np.flatnonzero(self.flags & int(Flag.DONE | Flag.HELD) != int(Flag.DONE)).tolist()


class _Counters:
    """One counter for each parameter, packed into int64 words: a sum over ranks overflows none."""

    def __init__(self, size: int, parameters: int) -> None:
        self._parameters = parameters
        self._per_word = COUNTER_BITS // size.bit_length()
        self.words = counter_words(size, parameters)
        self._shifts = torch.arange(self._per_word, device="cpu") * size.bit_length()
        self._mask = (1 << size.bit_length()) - 1

    def fill(self, words: Tensor, used: Sequence[bool]) -> None:
        if not used:
            return
        ones = torch.zeros(self.words * self._per_word, dtype=torch.int64, device="cpu")
        ones[: self._parameters] = torch.tensor(used, dtype=torch.int64, device="cpu")
        words.copy_((ones.view(self.words, -1) << self._shifts).sum(1))

    def read(self, words: Tensor) -> tuple[bool, ...]:
        counts = (words.unsqueeze(1) >> self._shifts) & self._mask
        return tuple((counts.view(-1)[: self._parameters] > 0).tolist())


def _refuse_together(comm: Transport, every: _Words, refusal: Exception | None) -> None:
    refusing = every.saying(Flag.REFUSED)
    if not refusing:
        return
    reasons = gather_texts(comm, str(refusal or ""))
    if refusal is not None:
        raise refusal
    raise RuntimeError(
        f"{name_ranks(refusing)} of {comm.size} cannot take this step, so no rank does: {reasons[refusing[0]]}"
    )


def _check_joined(comm: Transport, every: _Words) -> None:
    missing = every.not_saying(Flag.ARRIVED)
    if missing:
        raise RuntimeError(
            f"{name_ranks(missing)} of {comm.size} left this step by hvd.join(), which cannot stand in for a sketched "
            "exchange: put the training loop into 'with optimizer.join():' on every rank instead"
        )


def _check_same_exchange(every: _Words) -> None:
    if len(set(every.serials.tolist())) > 1:
        raise RuntimeError(
            "the ranks step different optimizers, whose gradients would be added up: in rank order their exchanges are "
            f"number {every.serials.tolist()} of those made. Step several optimizers in the same order on every rank"
        )


def _all_hold(every: _Words) -> bool:
    """Whether all ranks that have data hold averaged gradients, or have nothing new. Raises where some hold some."""
    others = every.not_saying(Flag.HELD | Flag.DONE)
    holding = [rank for rank in every.saying(Flag.HELD) if rank not in every.saying(Flag.DONE)]
    if holding and others:
        raise RuntimeError(
            f"{name_ranks(holding)} came to this exchange with gradients that synchronize() has averaged, "
            f"{name_ranks(others)} with others: call synchronize(), zero_grad(), backward() and step() in the same "
            "order on every rank, and step() inside skip_synchronize() after synchronize()"
        )
    return bool(every.saying(Flag.HELD)) and not others


def _state_root(every: _Words) -> int | None:
    """The rank whose state the fresh ranks shall take over. Raises where no state fits all ranks."""
    others = every.not_saying(Flag.FRESH)
    if len(set(every.steps[others].tolist())) > 1:
        raise RuntimeError(
            f"the ranks are at different steps, in rank order {every.steps.tolist()}: load checkpoints of the same "
            "step on every rank, or on one rank and call broadcast_optimizer_state, and call step() equally often "
            "(loops of unequal length go into 'with optimizer.join():')"
        )
    kinds = (every.flags & int(Flag.LOADED)) >> LOADED_SHIFT
    if len(set(kinds[others].tolist())) > 1:
        told = tell_values([Loaded(kind).name.lower() for kind in kinds.tolist()])
        raise RuntimeError(
            f"the ranks have loaded different kinds of checkpoints before step {every.steps[0]}: {told}. Load "
            "on every rank its own, on every rank a consolidated one, or on one rank and call broadcast_optimizer_state"
        )
    return others[0] if others and len(others) < len(every.flags) else None


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite; waits for the device of the tensors.

    One pass, half the time of a copy; isfinite().all() takes four copies.
    """
    extremes = [torch.stack(torch.aminmax(tensor)) for tensor in tensors if tensor.numel()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
