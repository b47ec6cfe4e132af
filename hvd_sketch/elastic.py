"""Elastic Horovod: a job whose hosts come and go, with residuals that survive (``import hvd_sketch.elastic``)."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.torch.elastic.state import TorchState

from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.setup import refused_together, require_equal
from hvd_sketch.model.broadcast import broadcast_optimizer_state, broadcast_state
from hvd_sketch.model.checkpoint import at_step, step_of
from hvd_sketch.model.local_steps import LocalSteps
from hvd_sketch.model.optimizer import ROUND_KEY, STATE_KEY, DistributedOptimizer
from hvd_sketch.model.parameters import NamedParameter
from hvd_sketch.transport import HorovodTransport, Transport
from hvd_sketch.transport.base import gather_texts
from hvd_sketch.transport.stall import watched

CONFIGURATIONS: dict[str, type[Compression]] = {each.__name__: each for each in (SketchConfig, LowRankConfig)}
logger = logging.getLogger(__name__)


class SketchState(TorchState):
    """What ``hvd.elastic.run`` carries from one set of ranks to the next::

        state = SketchState(model, torch.optim.SGD(model.parameters(), lr=0.1), compression=compression, batch=0)

        @hvd.elastic.run
        def train(state):
            for state.batch in range(state.batch, batches):
                ...
                state.optimizer.step()
                state.commit()

    After a reset parameters, the wrapped optimizer's state, the compression and the objects are rank 0's. Every rank
    that was there before keeps its momentum and its residual, multiplied by the new number of ranks over the old one:
    the averaged update that is still to come stays the same. A new rank begins with zeros. What a lost rank had not
    sent is lost, and rank 0 says how much it was at the last commit. With ``shares_residuals`` every commit also
    exchanges the mean of all residuals, in as many bytes as a dense step, and that of momenta. After a loss all ranks
    go on from it, and only what was made since the commit is lost.

    With ``every`` the optimizer is wrapped by :class:`~hvd_sketch.LocalSteps`. A commit ends the round first, and after
    a reset every rank goes on with rank 0's state of the wrapped optimizer, too.

    Communication: :meth:`commit` and :meth:`sync` are collective, and so is what ``hvd.elastic.run`` does.

    Args:
        model: of every rank.
        optimizer: a plain torch optimizer of its parameters, which is wrapped again after every reset.
        compression, named_parameters: as for :class:`~hvd_sketch.DistributedOptimizer`.
        arguments: others of its arguments, by name; not ``levels=2``.
        every: steps from one exchange to the next, as for :class:`~hvd_sketch.LocalSteps`; None: each step exchanges.
        shares_residuals: whether a commit keeps what all ranks have not sent, in 4 bytes per parameter more, 8 with
            ``momentum``. After a loss a new rank, too, begins with that mean.
        **objects: by name, what else is to be carried; they become attributes.

    Attributes:
        model: as given.
        optimizer: a :class:`~hvd_sketch.DistributedOptimizer` or :class:`~hvd_sketch.LocalSteps` over the ranks of now;
            None before ``hvd.elastic.run``.

    Raises:
        ValueError: ``levels=2`` among the arguments; on every rank, by :meth:`sync`: ``shares_residuals`` differs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compression: Compression | None = None,
        named_parameters: Iterable[NamedParameter] | None = None,
        arguments: dict[str, Any] | None = None,
        every: int | None = None,
        shares_residuals: bool = False,
        **objects: Any,
    ) -> None:
        if (arguments or {}).get("levels", 1) != 1:
            raise ValueError(
                "an elastic job has one level: of two, only a host's first rank keeps residuals, and after a reset "
                "another one may be the first. Leave levels=2 out of the arguments of SketchState"
            )
        named = list(named_parameters if named_parameters is not None else model.named_parameters())
        self._inner = optimizer
        self._wrap: Callable[..., DistributedOptimizer | LocalSteps]
        self._compression = compression
        if every is None:
            self._wrap = partial(DistributedOptimizer, optimizer, named, **arguments or {})
        else:
            self._wrap = partial(LocalSteps, optimizer, named, every=every, **arguments or {})
        self._committed: dict[str, Any] | None = None  # state of the optimizer
        self._kept: dict[str, Any] | None = None  # with which it goes on after a reset
        self._shares_residuals = shares_residuals
        self._mean: dict[str, Any] | None = None  # of all ranks' exchanges, at the last commit
        self._ranks, self._place = 0, -1  # over which the optimizer was wrapped last, and this one among them
        self._squares: list[float] = []  # of each of their residuals, added up, at the last commit
        super().__init__(model=model, **objects)
        del self._saved_state["optimizer"]  # ours is no object to send
        self.optimizer: Any = None

    def save(self) -> None:
        """Remember everything as it is now. Communication: none."""
        if self.optimizer is not None:
            self._committed = copy.deepcopy(self.optimizer.state_dict())
            self._ranks, self._place = self.optimizer.transport.size, self.optimizer.transport.rank
        super().save()

    def commit(self) -> None:
        """:meth:`save`, and go on with other hosts where they have changed. Communication: collective."""
        self._save_together()
        self.check_host_updates()

    def _save_together(self) -> None:
        """The mean of all first: where that fails, everything is as at the commit before. Communication: collective."""
        mean = None
        with _lost_ranks_as_horovods():
            self._end_round()
            if self._shares_residuals and self.optimizer is not None:
                mean = self.optimizer.state_dict(consolidated=True)[STATE_KEY]
            self.save()
            self._mean = mean
            self._tell_residuals()

    def _end_round(self) -> None:
        """Between rounds all ranks have the same parameters. Communication: collective with ``every``."""
        if isinstance(self.optimizer, LocalSteps):
            self.optimizer.sync()

    def _tell_residuals(self) -> None:
        """Tell each other how much every rank keeps: what is lost with it. Communication: collective."""
        if self.optimizer is None or self._committed is None:
            return
        sketched = self._committed[STATE_KEY]["sketched"]
        kept = sketched["v"] if sketched is not None else torch.zeros(1, device="cpu")
        square = kept.double().square().sum().cpu()
        transport: Transport = self.optimizer.transport
        with watched(transport, "commit"):
            self._squares = transport.allgather(square.view(1)).tolist()

    def restore(self) -> None:
        """Go back to what was saved last. Communication: none."""
        self._kept = self._committed
        if self._committed is not None:
            ours = (STATE_KEY, ROUND_KEY)
            self._inner.load_state_dict({key: value for key, value in self._committed.items() if key not in ours})
        super().restore()

    def check_host_updates(self) -> None:
        """See Horovod's. Communication: collective."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:  # on all ranks
            with _lost_ranks_as_horovods():
                self._end_round()
            raise HostsUpdatedInterrupt(skip_sync=False) from None  # sync() must wrap the optimizer again

    def reset(self) -> None:
        """Called after the ranks have changed, before :meth:`sync`. Communication: none."""
        if self._kept is None and self.optimizer is not None:
            self._kept = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer = None

    def sync(self) -> None:
        """Make the ranks of now equal, and wrap the optimizer over them. Communication: collective."""
        super().sync()
        transport = HorovodTransport()
        transport.can_split = False  # after a loss all must notice, not only the lost rank's row and column
        require_equal(transport, {"shares_residuals": self._shares_residuals})
        broadcast_optimizer_state(self._inner, 0, transport)
        self._compression = _of_rank_0(self._compression, transport)
        self.optimizer = self._wrap(self._compression, transport=transport)
        with _lost_ranks_as_horovods():
            self._go_on(transport)
        self._kept, self._mean, self._squares = None, None, []
        self._save_together()

    def _go_on(self, transport: Transport) -> None:
        """Load what this rank has kept, or zeros, at rank 0's step. Communication: collective."""
        own = self._kept if self._kept is not None else self.optimizer.state_dict()
        with watched(transport, "go on after a reset"):
            own_places = torch.tensor([[self._ranks, self._place if self._kept is not None else -1]], device="cpu")
            ranks, places = transport.allgather(own_places).unbind(1)
            step = int(transport.broadcast_(torch.tensor([step_of(own)], device="cpu")))
        if not bool((places >= 0).any()):
            return
        before = int(ranks.max())
        lost = sorted(set(range(before)) - set(places.tolist()))
        mean = self._mean_of_all(transport, step) if lost else None
        exchanged = mean or _for_other_ranks(own[STATE_KEY], transport, transport.size / before)
        if mean is None and self._kept is None:
            exchanged = at_step(exchanged, step)
        between_rounds = {ROUND_KEY: own[ROUND_KEY]} if ROUND_KEY in own else {}
        self.optimizer.load_state_dict({**self._inner.state_dict(), STATE_KEY: exchanged, **between_rounds})
        self.optimizer.take_over_state(0)
        if transport.rank == 0 and lost:
            self._tell_of_loss(lost, before, step, is_shared=mean is not None)

    def _mean_of_all(self, transport: Transport, step: int) -> dict[str, Any] | None:
        """What rank 0 has of all ranks' exchanges at a step; None: nothing, or of another step.

        Communication: collective.
        """
        has_mean = torch.tensor([self._mean is not None and step_of({STATE_KEY: self._mean}) == step], device="cpu")
        if not bool(transport.broadcast_(has_mean)):
            return None
        return broadcast_state(self._mean, 0, transport)

    def _tell_of_loss(self, lost: list[int], before: int, step: int, is_shared: bool) -> None:
        told = f"{len(lost)} of {before} ranks are gone"
        if is_shared:
            logger.warning("%s. All go on from the mean of all residuals at step %d, the last commit.", told, step)
        elif self._squares:
            gone, all_of_it = sum(self._squares[rank] for rank in lost), sum(self._squares)
            logger.warning(
                "%s, and with them what they had not sent: residuals of norm %.3g at the last commit, where that of "
                "all together was %.3g. The others go on from step %d.",
                *(told, gone**0.5, all_of_it**0.5, step),
            )


def _of_rank_0(compression: Compression | None, transport: Transport) -> Compression | None:
    """A new rank may have made another one, from the number of ranks that there are now. Communication: collective.

    Raises:
        ValueError: on every rank: one has something else.
    """
    with refused_together(transport):
        if compression is not None and not isinstance(compression, Compression):
            raise ValueError(f"compression must be a SketchConfig, a LowRankConfig, or None, got {compression!r:.100}")
    own = None if compression is None else [type(compression).__name__, asdict(compression)]
    with watched(transport, "compare compressions"):
        told = json.loads(gather_texts(transport, json.dumps(own))[0])
    taken = None if told is None else CONFIGURATIONS[told[0]](**told[1])
    if taken != compression:
        logger.warning("rank %d takes rank 0's compression, %r, for its own, %r", transport.rank, taken, compression)
    return taken


@contextmanager
def _lost_ranks_as_horovods() -> Iterator[None]:
    """An error of a collective becomes the one after which ``hvd.elastic.run`` goes on."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        if isinstance(error, HorovodInternalError | HostsUpdatedInterrupt):
            raise
        raise HorovodInternalError(str(error)) from error


def _for_other_ranks(state: dict[str, Any], transport: Transport, factor: float) -> dict[str, Any]:
    """One rank's own state of an exchange as that of a rank of now, momentum and residual times a factor."""
    sketched = state["sketched"]
    if sketched is None:
        return state
    kept = {name: sketched[name] * factor for name in ("u", "v") if name in sketched}
    return {**state, "sketched": {**sketched, **kept, "rank": transport.rank, "size": transport.size}}
