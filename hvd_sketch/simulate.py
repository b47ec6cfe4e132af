"""What an exchange between many ranks would do to a model, in one process: before a cluster is booked.

::

    simulation = Simulation(model.named_parameters(), sketch, ranks=16)
    for losses in train(model, optimizer, simulation, loss_of, batches):
        print(losses, simulation.ledger.compression_ratio())

The ranks are real exchanges: updates, residuals and ledger are those of as many ranks that sum in rank order, to the
bit. (32 ranks and more that exchange all dense sum over rows and columns of a grid, as real ones do.) Gradients come
one rank after the other, so that only one of them is in memory. The ranks share one model: its buffers (batch norm's
statistics) and torch's random numbers (dropout) go on from rank to rank; real ranks' do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import Report, all_finite
from hvd_sketch.exchange.base import Exchange, SparseUpdate
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.flat_parameters import separate_gradients
from hvd_sketch.model.gradients import shared_options
from hvd_sketch.model.parameters import NamedParameter, check_exchangeable, first_names
from hvd_sketch.model.routes import MakeExchange, build_exchanges, make_exchange, mark_sparse, routes_of, unsent_of
from hvd_sketch.model.step_ahead import Ahead
from hvd_sketch.transport.grid import in_grid
from hvd_sketch.transport.local import LocalRanks, LocalTransport

Batch = TypeVar("Batch")
AGREE_LIMIT_S = 3600.0  # for one collective: the ranks share this machine's cores


class Simulation:
    """All ranks' exchanges of one model's gradients.

    In every step each rank's gradient is taken in after its backward pass, then all agree::

        for rank in range(simulation.ranks):
            optimizer.zero_grad()
            loss_of(model, batch_of(rank)).backward()
            simulation.accumulate(rank)
        simulation.agree()  # p.grad is what the exchange leaves on every rank
        optimizer.step()

    A :class:`~hvd_sketch.optim.LagAdamW` needs ``simulation.prepare(optimizer)`` before the first step.

    Memory: u and v of every rank (8 bytes per rank and sketched coordinate; 4 without momentum), and its table; with
    low rank 8 bytes, v and the update. Of tensors that go dense, the gradient of every rank.

    Real ranks skip a step in which a gradient is not finite. Here it ends the simulation: the ranks before have taken
    theirs in.

    Args:
        named: the model's parameters, all on one device.
        sketch: how to compress, sums in rank order; None: all goes dense.
        ranks: how many, at least 1.
        make: builds the exchange of the large tensors; default: the one that ``sketch`` is of.

    Attributes:
        ledger: of rank 0. Bytes are equal on all ranks.
        updated: how many coordinates of the model the last step updated.

    Raises:
        ValueError: parameters that cannot be exchanged, a configuration that does not fit them.
    """

    def __init__(
        self,
        named: Iterable[NamedParameter],
        sketch: Compression | None,
        ranks: int,
        make: MakeExchange = make_exchange,
    ) -> None:
        names = first_names(named)
        self._named = [(name, parameter) for parameter, name in names.items() if parameter.requires_grad]
        self._frozen = [(name, parameter) for parameter, name in names.items() if not parameter.requires_grad]
        check_exchangeable(self._named)
        self.ranks, self.updated = ranks, 0
        self._config = replace(sketch, deterministic=True) if sketch is not None else None
        self._routes = routes_of(self._named, self._config)
        self._used: list[bool] = []  # which parameters have a gradient in this step
        self._ahead: Ahead | None = None
        self._next = 0  # the rank whose gradient comes next
        self._threads = LocalRanks(ranks, AGREE_LIMIT_S)
        ranks_exchanges = self._threads.run(partial(self._build, make))
        self._exchanges: list[list[Exchange]] = ranks_exchanges
        self.ledger = ranks_exchanges[0][0].ledger

    def _build(self, make: MakeExchange, transport: LocalTransport) -> list[Exchange]:
        options = shared_options(self._named)
        options["ledger"] = CommLedger(max_records=0)  # totals are kept
        return build_exchanges(self._routes, self._config, in_grid(transport), options, make=make)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell a ``LagAdamW`` of these parameters which are compressed, as ``DistributedOptimizer`` does.

        Raises:
            ValueError: the optimizer updates parameters that the simulation does not exchange.
        """
        known = {id(parameter) for _, parameter in self._named}
        others = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        count = sum(id(parameter) not in known for parameter in others)
        if count:
            raise ValueError(
                f"the optimizer updates {count} parameters that the simulation was not given, or that were frozen when "
                "it was made: it would not average their gradients over the ranks. Make a new Simulation of all "
                "parameters that are trained"
            )
        mark_sparse(optimizer, self._named, self._config)

    def accumulate(self, rank: int) -> None:
        """Take in ``p.grad`` of all parameters, from a backward pass of one rank; ranks come in the order 0, 1, …

        A parameter without a gradient on rank 0 must have none on any rank, and is not updated.

        Raises:
            ValueError: another rank's turn, or other parameters have gradients than on rank 0, or than were trained
                when the simulation was made.
            FloatingPointError: a gradient is not finite.
        """
        if rank != self._next:
            raise ValueError(f"ranks come in order and once per step: expected {self._next}, got {rank}")
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad and parameter.grad is not None]
        if thawed:
            raise ValueError(
                f"{', '.join(thawed[:5])} began to require a gradient after the simulation was made, which would not "
                "average it over the ranks. Make a new Simulation of all parameters that are trained"
            )
        separate_gradients(parameter for _, parameter in self._named)
        used = [parameter.grad is not None for _, parameter in self._named]
        if rank == 0:
            self._used = used
        elif used != self._used:
            names = [name for (name, _), a, b in zip(self._named, used, self._used, strict=True) if a != b]
            raise ValueError(
                f"rank {rank} and rank 0 have gradients of different parameters ({', '.join(names[:5])}), which the "
                "simulation does not take: give each a gradient on every rank, zeros where there is none"
            )
        weight_decay = self._config.weight_decay if self._config is not None else 0.0
        gradients = [route.flat.pack(weight_decay) for route in self._routes]
        if not all_finite([values for gradient in gradients for values in gradient]):
            raise FloatingPointError(
                f"step {self._exchanges[0][0].step_number}: the gradient of rank {rank} is not finite: lower the "
                "learning rate. (Real ranks would all skip this step.)"
            )
        for route, exchange, gradient in zip(self._routes, self._exchanges[rank], gradients, strict=True):
            if exchange.holds_gradient:  # the memory is the next rank's
                gradient = [values.clone() for values in gradient]
            exchange.accumulate(gradient, route.used(used)[1])
        self._next += 1

    @contextmanager
    def ahead(self, rank: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, the parameters are where :meth:`DistributedOptimizer.ahead` has them on a rank, for its passes.

        Args:
            rank: whose.
            optimizer: the one that is stepped after :meth:`agree`.
        """
        if self._ahead is None or self._ahead.optimizer is not optimizer:
            self._ahead = Ahead(optimizer)
        self._ahead.go_(unsent_of(self._routes, self._exchanges[rank]))
        try:
            yield
        finally:
            self._ahead.back_()

    def agree(self) -> None:
        """Make every ``p.grad`` what the exchange leaves on every rank, after :meth:`accumulate` for every rank.

        Raises:
            ValueError: not all ranks have accumulated.
        """
        if self._next != self.ranks:
            raise ValueError(f"{self.ranks} ranks take part, but only {self._next} have accumulated")
        self._next = 0
        updates = self._threads.run(self._agree)[0]
        self.updated = 0
        for route, update in zip(self._routes, updates, strict=True):
            self.updated += update.values.numel()
            route.unpack(update, route.used(self._used)[0])

    def _agree(self, transport: LocalTransport) -> list[SparseUpdate]:
        exchanges = self._exchanges[transport.rank]
        exchanges[0].begin_step(Report(used=self._used), unused=self._routes[0].used(self._used)[1])
        updates = [exchange.agree() for exchange in exchanges]
        return updates if transport.rank == 0 else []  # they are equal

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit, on the CPU."""
        states = [[_on_cpu(exchange.state_dict()) for exchange in exchanges] for exchanges in self._exchanges]
        return {"ranks": states, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of as many ranks."""
        for exchanges, states in zip(self._exchanges, state["ranks"], strict=True):
            for exchange, saved in zip(exchanges, states, strict=True):
                exchange.load_state_dict(saved)
        self.ledger.load_state_dict(state["ledger"])
        self._next = 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    simulation: Simulation,
    loss_of: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    step_ahead: bool = False,
) -> Iterator[list[float]]:
    """Train on batches dealt out to the ranks in turn, until there are not enough for all; yields each step's losses.

    Args:
        model: whose parameters the simulation exchanges.
        optimizer: a plain one of torch, of the same parameters.
        simulation: of the exchange.
        loss_of: the loss of a batch, a mean over its examples.
        batches: a loader, for instance.
        step_ahead: as with :meth:`~hvd_sketch.DistributedOptimizer.ahead`.

    Returns:
        For each step the loss of every rank, before the step.
    """
    simulation.prepare(optimizer)
    dealt = iter(batches)
    while len(of_ranks := list(islice(dealt, simulation.ranks))) == simulation.ranks:
        losses = []
        for rank, batch in enumerate(of_ranks):
            optimizer.zero_grad()
            with simulation.ahead(rank, optimizer) if step_ahead else nullcontext():
                loss = loss_of(model, batch)
                loss.backward()
            simulation.accumulate(rank)
            losses.append(float(loss.detach()))
        simulation.agree()
        optimizer.step()
        yield losses


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of u and v of 256 ranks beside the originals would not fit into a GPU of 24 GiB."""
    return {name: kept.cpu() if isinstance(kept, Tensor) else kept for name, kept in state.items()}
