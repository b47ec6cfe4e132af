"""Two levels: a dense mean inside of every host, then the compressed exchange between one rank of each."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.config import ALL_DENSE, Compression
from hvd_sketch.exchange.agreement import Report
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.exchange.saved import SavedState
from hvd_sketch.exchange.setup import refused_together
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.broadcast import broadcast_state, broadcast_tensors
from hvd_sketch.model.flat_parameters import FlatParameters
from hvd_sketch.model.gradients import NOTHING_TO_REPORT, GradientExchange
from hvd_sketch.model.mesh import ShardRanks
from hvd_sketch.model.parameters import NamedParameter
from hvd_sketch.shards import is_sharded
from hvd_sketch.transport.base import Splitting, Transport, gather_texts, name_ranks
from hvd_sketch.transport.stall import watched

HOST_VARIABLE = "HVD_SKETCH_HOST"
KINDS = ("layout", "sketched", "dense", "ledger")  # entries of a state
HAND_ON = "hand the update on inside of a host"
LEADER = 0  # the rank inside of each host that exchanges with other hosts
logger = logging.getLogger(__name__)


class Outcome(IntEnum):
    """How an exchange between the hosts has ended."""

    SKIPPED = 0
    AVERAGED = 1
    HELD = 2  # all ranks hold averaged gradients
    OVER = 3  # no rank has data
    REFUSED = 4  # an error on every rank


def host_name() -> str:
    """What ranks of one host have in common: HVD_SKETCH_HOST, or the name and the start of the system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return os.environ.get(HOST_VARIABLE) or f"{socket.gethostname()} {boot}"


class TwoLevels:
    """The gradients of one model on ranks that share hosts; in place of a ``GradientExchange``, with its interface.

    Every step begins with the dense mean over the ranks of a host. Its first rank, the leader, exchanges that mean with
    the other hosts' leaders, and hands the update on. So bytes between hosts, residuals and momentum are those of one
    rank a host. Hosts count by their ranks. With one host all goes dense.

    Args:
        named, config, transport, **settings: of :class:`~hvd_sketch.model.gradients.GradientExchange`.
        host: where this rank runs; default: :func:`host_name`.

    Attributes:
        config: as given; with one host all goes dense.
        ledger: of what this rank sends between hosts: nothing, unless it is a leader.

    Raises:
        ValueError: on every rank: the transport cannot be split, parameters are sharded, gradients are to be made
            sparse; and as ``GradientExchange``.
    """

    def __init__(
        self,
        named: Sequence[NamedParameter],
        config: Compression | None,
        transport: Transport,
        *,
        host: str | None = None,
        **settings: Any,
    ) -> None:
        self._transport = transport
        with refused_together(transport):
            splitting = _splitting(transport)
            _check(named, settings)
        hosts = gather_texts(transport, host if host is not None else host_name())
        firsts = [hosts.index(each) for each in hosts]  # for each rank the leader of its host
        self._leader, self._leaders = firsts[transport.rank], sorted(set(firsts))
        self._on_host = [rank for rank, first in enumerate(firsts) if first == self._leader]
        with watched(transport, "form groups of hosts"):
            self._host = splitting.split(self._leader)
            among_leaders = splitting.split(int(transport.rank in self._leaders))
        if len(self._leaders) == 1 and config is not None:
            config = _all_dense(config, transport.rank)
        self.config = config
        self._flat = FlatParameters(named)
        check_every = settings["check_every"]
        self._inside = GradientExchange(named, None, self._host, check_every=check_every, max_skips=0)
        self._between: GradientExchange | None = None
        with refused_together(self._host):
            if self._host.rank == LEADER:
                self._between = GradientExchange(named, config, among_leaders, **settings)
        share = self._host.size if settings["is_sum"] else self._host.size * len(self._leaders) / transport.size
        # Of a host's mean in the mean of all.
        self._share = torch.tensor(float(share), dtype=torch.float32, device="cpu") if share != 1 else None
        self.ledger = self._between.ledger if self._between is not None else CommLedger()
        self.shard_ranks = ShardRanks(())
        self.skipped_steps = 0
        self._had_data = True  # in the last step
        self._is_over = self.is_held = False
        # Here and not as a decorator, for the reason in GradientExchange.
        self.average = torch.compiler.disable(self.average)  # type: ignore[method-assign]

    @property
    def compressed(self) -> ResidualExchange | None:
        """The exchange that compresses, on a leader; None on other ranks and where all goes dense."""
        return self._between.compressed if self._between is not None else None

    @property
    def active(self) -> tuple[int, ...]:
        """All ranks: where some leave early, :meth:`had_data` says so."""
        return tuple(range(self._transport.size))

    @property
    def keepers(self) -> list[int]:
        """The ranks that keep residuals: the leaders."""
        return self._leaders

    @property
    def step_number(self) -> int:
        """See :class:`~hvd_sketch.model.gradients.GradientExchange`."""
        return self._inside.step_number

    @property
    def last_begun(self) -> int:
        """See :class:`~hvd_sketch.model.gradients.GradientExchange`."""
        return self._inside.last_begun

    @property
    def reset_coordinates(self) -> int:
        """See :class:`~hvd_sketch.model.gradients.GradientExchange`; 0 on ranks that keep no residual."""
        return self._between.reset_coordinates if self._between is not None else 0

    def average(self, report: Report = NOTHING_TO_REPORT, inverse_scale: Tensor | None = None) -> bool:
        """See :meth:`GradientExchange.average`. Communication: collective, all ranks of all hosts."""
        refusal: Exception | None = None
        has_mean = False
        try:
            has_mean = self._inside.average(report, inverse_scale)
        except (RuntimeError, TypeError, ValueError) as error:  # on all ranks of this host, the leader among them
            refusal = _placed(error, "within one host", self._on_host)
        if self._between is not None:
            outcome = self._lead(report, has_mean, refusal)
        elif refusal is not None:
            raise refusal
        else:
            outcome = self._follow()
        self._is_over, self.is_held = outcome == Outcome.OVER, outcome == Outcome.HELD
        if outcome in (Outcome.SKIPPED, Outcome.AVERAGED):
            self._had_data = not report.done
        return outcome in (Outcome.AVERAGED, Outcome.HELD)

    def _lead(self, report: Report, has_mean: bool, refusal: Exception | None) -> Outcome:
        """Exchange this host's mean with the other hosts, and tell this host's ranks what has come of it.

        What this host's ranks refuse they have raised already, and it is told to the other hosts only.
        """
        between, inside = self._between, self._inside
        assert between is not None
        own = Report(
            finite=has_mean or inside.is_over,
            scaled=report.scaled,
            forgives=report.forgives,
            done=inside.is_over,
            held=inside.is_held,
            refusal=refusal,
            groups=report.groups,
            was_unused=report.was_unused,
        )
        try:
            if between.average(own, self._share, is_behind=report.done):
                outcome = Outcome.HELD if between.is_held else Outcome.AVERAGED
            else:
                outcome = Outcome.OVER if between.is_over else Outcome.SKIPPED
        except (RuntimeError, TypeError, ValueError) as error:
            if refusal is None:
                _placed(error, "among the first ranks of the hosts", self._leaders)
                self._tell(Outcome.REFUSED)
                gather_texts(self._host, str(error))
            raise
        self.skipped_steps = between.skipped_steps
        gradients = self._tell(outcome)
        if outcome == Outcome.AVERAGED:
            broadcast_tensors(gradients, LEADER, self._host)
        return outcome

    def _tell(self, outcome: Outcome) -> list[Tensor]:
        """Tell how the exchange has ended, and which parameters have a gradient; these gradients."""
        gradients = [parameter.grad for parameter in self._flat.parameters]
        words = [outcome, self.skipped_steps, *(gradient is not None for gradient in gradients)]
        with watched(self._host, HAND_ON, self.step_number):
            self._host.broadcast_(torch.tensor(words, device="cpu"), LEADER)
        return [gradient for gradient in gradients if gradient is not None]

    def _follow(self) -> Outcome:
        """Take over from the leader what has come of the exchange, and the update."""
        words = torch.zeros(2 + len(self._flat.parameters), dtype=torch.int64, device="cpu")
        with watched(self._host, HAND_ON, self.step_number):
            number, self.skipped_steps, *used = self._host.broadcast_(words, LEADER).tolist()
        outcome = Outcome(number)
        if outcome == Outcome.REFUSED:
            reason = gather_texts(self._host, "")[LEADER]
            raise RuntimeError(f"rank {self._leader}, which exchanges for this host, could not: {reason}")
        if outcome == Outcome.SKIPPED:
            self._flat.fill_gradients(float("nan"), used)
        elif outcome == Outcome.AVERAGED:
            gradients = self._flat.writable_gradients(used)
            broadcast_tensors([gradient for gradient in gradients if gradient is not None], LEADER, self._host)
        if outcome in (Outcome.SKIPPED, Outcome.AVERAGED):
            self.ledger.begin_step()
        return outcome

    def step_without_data(self) -> bool:
        """See :meth:`GradientExchange.step_without_data`. Communication: collective, all ranks of all hosts."""
        self.average(Report(done=True))
        return self._is_over

    def had_data(self) -> tuple[int, ...]:
        """See :meth:`GradientExchange.had_data`. Communication: collective, all ranks of all hosts."""
        with watched(self._transport, "end without data"):
            had_data = self._transport.allgather(torch.tensor([int(self._had_data)], device="cpu"))
        return tuple(had_data.nonzero().flatten().tolist())

    def check_root(self, root: int) -> None:
        """Refuse a root that keeps no state, because it is not the first rank of its host. Communication: none.

        Raises:
            ValueError: on every rank.
        """
        if root not in self._leaders:
            raise ValueError(
                f"rank {root} keeps no state with levels=2, ranks {self._leaders} do: take one of them as the root"
            )

    def take_over_state(self, root: int) -> None:
        """See :meth:`GradientExchange.take_over_state`. Communication: collective, all ranks.

        Raises:
            ValueError: see :meth:`check_root`.
        """
        self.check_root(root)
        if self._between is not None:
            self._between.take_over_state(self._leaders.index(root))
        counts = self._inside.state_dict() if self._transport.rank == root else None
        self._inside.load_state_dict(broadcast_state(counts, root, self._transport))

    def forget(self) -> None:
        """Zero momentum and residuals. Communication: none."""
        self._inside.forget()
        if self._between is not None:
            self._between.forget()

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """See :meth:`GradientExchange.state_dict`; unless it is a leader a rank keeps counts of steps alone.

        Communication: none; with ``consolidated`` collective, all ranks.
        """
        if consolidated and self._between is None:
            return broadcast_state(None, LEADER, self._host)
        own = self._between.state_dict(consolidated) if self._between is not None else dict.fromkeys(KINDS)
        state = {**own, "inside": self._inside.state_dict(), "skipped_steps": self.skipped_steps}
        return broadcast_state(state, LEADER, self._host) if consolidated else state

    def read_state(self, state: object) -> Callable[[], None]:
        """See :meth:`GradientExchange.read_state`; unless it is a leader a rank takes counts of steps alone."""
        saved = SavedState(state, self._transport.rank)
        loads = [self._between.read_state(state)] if self._between is not None else []
        has_counts = saved.has("inside")  # older states have none
        if has_counts:
            loads.append(self._inside.read_state(saved.entry("inside", Mapping)))
        skipped_steps = saved.count("skipped_steps") if has_counts else 0

        def take_over() -> None:
            for load in loads:
                load()
            self.skipped_steps = skipped_steps if self._between is None else self._between.skipped_steps

        return take_over

    def __repr__(self) -> str:
        hosts = f"{len(self._leaders)} hosts, rank {self._host.rank} of {self._host.size} on its own"
        return f"{hosts}, {self._inside!r} inside of them, {self._between!r} between them"


def _placed(error: Exception, where: str, ranks: list[int]) -> Exception:
    """The error, which also says which ranks of the job it means: their groups count them from 0."""
    error.args = (f"{error}\nHere ranks are counted {where}: they are {name_ranks(ranks)} of the job.",)
    return error


def _all_dense(config: Compression, rank: int) -> Compression:
    """There is no other host to compress for."""
    if rank == 0:
        logger.warning("levels=2 with all ranks on one host: everything goes dense, nothing is compressed")
    return replace(config, dense_below=ALL_DENSE)


def _splitting(transport: Transport) -> Splitting:
    """The transport. Raises ValueError where it cannot be split."""
    if isinstance(transport, Splitting):
        return transport
    raise ValueError(
        f"levels=2 needs a transport that can be split, got {type(transport).__name__}: give it a method split(color), "
        "or leave out levels=2"
    )


def _check(named: Sequence[NamedParameter], settings: dict[str, Any]) -> None:
    """Refuse what does not go with two levels. Raises ValueError. Communication: none."""
    if any(is_sharded(parameter) for _, parameter in named):
        raise ValueError("sharded parameters have two levels already, their mesh's dimensions: leave out levels=2")
    if settings["makes_sparse"]:
        raise ValueError("levels=2 hands dense gradients on: leave out sparse_as_dense, or levels=2")
