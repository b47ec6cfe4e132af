"""One model's gradients through the sketched and the dense exchange, in one fixed order on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count, zip_longest
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.config import Compression
from hvd_sketch.exchange.agreement import Agreed, Report, all_finite
from hvd_sketch.exchange.base import Exchange, Options
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.exchange.saved import WITHOUT_RESIDUALS, SavedState
from hvd_sketch.ledger import CommLedger
from hvd_sketch.model.drift import are_equal_everywhere, checksums, describe_drift, digest, digest_of_checksums
from hvd_sketch.model.flat_parameters import separate_gradients
from hvd_sketch.model.mesh import ShardRanks, require_equal_shards
from hvd_sketch.model.parameters import NamedParameter, describe_dtype
from hvd_sketch.model.routes import MakeExchange, build_exchanges, make_exchange, routes_of, unsent_of
from hvd_sketch.model.settings import compared_numbers, error_of_settings
from hvd_sketch.observer import Kind
from hvd_sketch.shards import local
from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.grid import in_grid

CHECK_EVERY = 100  # by default, how many steps go by between two comparisons of the ranks' parameters
NOTHING_TO_REPORT = Report()
logger = logging.getLogger(__name__)
_order = count(1)  # of the steps of all optimizers of this process


def shared_options(named: Sequence[NamedParameter], max_skips: int = 25, flags_per_parameter: int = 1) -> Options:
    """What the exchanges of one model have in common, with a new ledger.

    Each compares all parameters: then the first already finds a rank that would not build the second.
    """
    described = [(name, tuple(local(p).shape), describe_dtype(p)) for name, p in named]
    return {
        "parameters": described,
        "ledger": CommLedger(),
        "max_skips": max_skips,
        "flags": len(described) * flags_per_parameter,
    }


class GradientExchange:
    """The sketched and the dense exchange of one model's gradients, in one fixed order on all ranks.

    Args:
        named: the parameters; equal on all ranks. Of DTensors the local shards are exchanged.
        config: how to compress; None: everything goes dense, without momentum.
        transport: this rank's end of the network.
        wire_dtype: what the dense exchange sends; None: see :meth:`Route.build`.
        is_sum: the gradients become sums over the ranks, not means.
        makes_sparse: where a rank's gradient is sparse, ``p.grad`` becomes a sparse tensor of rows on all ranks.
        check_every: steps after which the ranks compare their parameters; also after the first step. In the others they
            compare the settings of the groups that a report has. 0: neither.
        max_skips: see :class:`~hvd_sketch.exchange.base.Options`.
        make: builds the exchange of the large tensors; default: the one that ``config`` is of.

    Attributes:
        config: as given.
        ledger: of both exchanges.
        active: the ranks that had data in the last step.
        is_over: all ranks had run out of data in the last call of :meth:`average`.
        is_held: all ranks that had data held averaged gradients then, or had nothing new.
        shard_ranks: those that hold the other shards of the parameters.

    Communication: the constructor, :meth:`average`, :meth:`take_over_state` and ``state_dict(consolidated=True)`` are
    collective.
    """

    def __init__(
        self,
        named: Sequence[NamedParameter],
        config: Compression | None,
        transport: Transport,
        *,
        wire_dtype: torch.dtype | None = None,
        is_sum: bool = False,
        makes_sparse: bool = False,
        check_every: int = CHECK_EVERY,
        max_skips: int = 25,
        make: MakeExchange = make_exchange,
    ) -> None:
        require_equal_shards(transport, named)
        self.shard_ranks = ShardRanks(named)
        transport = in_grid(transport)
        self.active: tuple[int, ...] = tuple(range(transport.size))
        self._transport = transport
        self._named = list(named)
        self.config = config
        self._weight_decay = config.weight_decay if config is not None else 0.0
        self._scale = transport.size if is_sum else 1
        self._makes_sparse = makes_sparse
        self._check_every = check_every
        self.last_begun = 0  # among the steps of all optimizers of this process; 0: none yet
        self._begun = 0  # steps since construction or since a state was loaded
        self._were_equal = False  # the parameters, when they were last compared
        self._has_told = False  # that they never were
        self._has_told_gradients = False  # that the ranks' are equal
        self.is_over = self.is_held = False
        options = shared_options(self._named, max_skips, 2 if makes_sparse else 1)
        self.ledger = options["ledger"]
        self._routes = routes_of(self._named, config)
        with self.shard_ranks.refused_together():
            self._exchanges = build_exchanges(
                self._routes, config, transport, options, scale=self._scale, wire_dtype=wire_dtype, make=make
            )
        self._lead = self._exchanges[0]  # agrees on every step for both
        # No decorator: it imports Dynamo, which changes the filters of warnings. Every torch optimizer has imported it.
        self.average = torch.compiler.disable(self.average)  # type: ignore[method-assign]

    @property
    def compressed(self) -> ResidualExchange | None:
        """The exchange that compresses; None where all goes dense."""
        return next((exchange for exchange in self._exchanges if isinstance(exchange, ResidualExchange)), None)

    @property
    def unsent(self) -> list[tuple[Tensor, Tensor]]:
        """See :func:`~hvd_sketch.model.routes.unsent_of`."""
        return unsent_of(self._routes, self._exchanges)

    @property
    def scale(self) -> int:
        """What ``p.grad`` becomes in times of the mean over the ranks: 1, or of a sum their number."""
        return self._scale

    @property
    def keepers(self) -> list[int]:
        """The ranks that keep residuals: all."""
        return list(range(self._transport.size))

    @property
    def skipped_steps(self) -> int:
        """How many calls of :meth:`average` all ranks skipped."""
        return self._lead.skipped_steps

    @property
    def step_number(self) -> int:
        """Number of the step that comes next, from 0."""
        return self._lead.step_number

    @property
    def reset_coordinates(self) -> int:
        """How many of this rank's u and v were not finite and were set to zero."""
        return sum(exchange.reset_coordinates for exchange in self._exchanges)

    def average(
        self, report: Report = NOTHING_TO_REPORT, inverse_scale: Tensor | None = None, *, is_behind: bool = False
    ) -> bool:
        """Average all gradients over the ranks into ``p.grad``; False if all ranks skip instead, or all are done.

        A parameter of which no rank has a gradient has none afterwards. One of which any rank has a gradient has one on
        all ranks. After a skip every ``p.grad`` is NaN on every rank, so that all who look at it see the same.

        ``torch.compile`` leaves it out of its graphs, with all that it calls: its sizes and decisions come from other
        ranks.

        Args:
            report: what the caller knows of this rank. Where it says ``held`` on all ranks, or ``idle``, nothing is
                exchanged, and True is returned. Where it says ``done`` or ``idle``, only what is left in this rank's
                residual takes part.
            inverse_scale: see :meth:`FlatParameters.pack`; may differ between ranks.
            is_behind: this rank's parameters are not those of the others, because it has run out of data.

        Raises:
            RuntimeError: on every rank: see ``StepAgreement.agree``; the settings of the ranks' optimizers differ; or
                their parameters have drifted apart. Where these never were equal, rank 0 warns.
        """
        has_nothing = report.done or report.idle
        if has_nothing:
            for _, parameter in self._named:
                parameter.grad = None
        packed: list[list[Tensor]] = []
        sums: Tensor | None = None  # checksums of the parameters
        try:
            with self.ledger.observer.span(Kind.LOCAL, "pack"):
                packed = [] if report.held else self._pack(inverse_scale, has_nothing or is_behind)
            finite = report.finite and all_finite([values for slices in packed for values in slices])
            report = replace(report, finite=finite)
            if not (has_nothing or report.held or is_behind):
                report, sums = self._with_digest(report)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            report = replace(report, refusal=report.refusal or error)
        report = self.shard_ranks.agree(replace(report, used=self._flags()))
        # A rank without data uses nothing, but offers what is left in its residual.
        own_unused = () if has_nothing else self._routes[0].used(report.used)[1]
        for exchange, gradient in zip(self._exchanges[1:], packed[1:], strict=False):
            exchange.accumulate(gradient)  # a dense one: it may travel with the agreement, and nothing depends on it
        agreed = self._lead.begin_step(report, packed[0] if packed else (), own_unused)
        if agreed.settings_differ:
            raise error_of_settings(self._transport, report)
        self.is_over, self.is_held = not agreed.active, agreed.held
        if agreed.root is not None:
            for exchange in self._exchanges[1:]:
                exchange.take_over_state(agreed.root)
        if agreed.compared:
            assert sums is not None, "all ranks have made a digest, this one too"
            self._judge_drift(agreed.drifted, sums)
            if agreed.goes_on:
                self._judge_gradients([values for slices in packed for values in slices])
        if agreed.active and not agreed.held:
            self._take_step(agreed, packed)
        return agreed.goes_on or agreed.held

    def _flags(self) -> list[bool]:
        """For each parameter whether it has a gradient here; then, where it matters, whether that is sparse."""
        gradients = [parameter.grad for _, parameter in self._named]
        used = [gradient is not None for gradient in gradients]
        if self._makes_sparse:
            used += [gradient is not None and gradient.layout != torch.strided for gradient in gradients]
        return used

    def _pack(self, inverse_scale: Tensor | None, is_behind: bool) -> list[list[Tensor]]:
        """This rank's vector for each route, in slices. Where its parameters are out of date, they do not decay."""
        separate_gradients(parameter for _, parameter in self._named)
        for route in self._routes:
            route.flat.check_unchanged()
        weight_decay = 0.0 if is_behind else self._weight_decay
        return [route.flat.pack(weight_decay, inverse_scale) for route in self._routes]

    def _take_step(self, agreed: Agreed, packed: list[list[Tensor]]) -> None:
        self.active = agreed.active
        self._begun += 1
        self.last_begun = next(_order)
        if agreed.goes_on:
            self._exchange(packed, agreed.used)
            return
        for route, exchange in zip(self._routes, self._exchanges, strict=True):
            exchange.count_step()
            route.flat.fill_gradients(float("nan"), route.used(agreed.used)[0])

    def _exchange(self, packed: list[list[Tensor]], used: Sequence[bool]) -> None:
        with self.ledger.observer.span(Kind.LOCAL, "accumulate"):
            for route, exchange, gradient in zip(self._routes, self._exchanges, packed, strict=True):
                exchange.accumulate(gradient, route.used(used)[1])
        self.ledger.observer.accumulated()
        for route, exchange in zip(self._routes, self._exchanges, strict=True):  # in this order, as in Simulation
            route.unpack(exchange.agree(), route.used(used)[0], self._scale)
        for (_, parameter), is_sparse in zip(self._named, used[len(self._named) :], strict=False):
            if is_sparse and parameter.grad is not None:
                parameter.grad = parameter.grad.to_sparse(1)

    def _with_digest(self, report: Report) -> tuple[Report, Tensor | None]:
        """The report with what the ranks compare in this step, and the checksums, if these are what they compare.

        Parameters are compared around the first step since a start, then every ``check_every`` steps; the optimizer's
        settings in all others.
        """
        if not self._check_every or self._transport.size == 1:
            return report, None
        if self._begun <= 1 or self._lead.step_number % self._check_every == 0:
            sums = checksums([parameter for _, parameter in self._named])
            return replace(report, digest=digest_of_checksums(sums), of_parameters=True), sums
        is_told = report.groups and self._were_equal  # where they never were, training goes on
        return replace(report, digest=digest(compared_numbers(report)) if is_told else 0), None

    def _judge_drift(self, drifted: bool, sums: Tensor) -> None:
        """Parameters that differ are an error where they were equal before, and a warning where they never were."""
        were_equal, self._were_equal = self._were_equal, not drifted
        if not drifted:
            return
        told = describe_drift(self._transport, self._named, sums)
        rank, step = self._transport.rank, self._lead.step_number
        differ = f"the parameters differ between the ranks (seen from rank {rank}, before step {step}):{told}"
        if were_equal:
            raise RuntimeError(
                f"{differ}\nThey were equal before: change parameters, p.grad and learning rates alike on every rank, "
                "and load the same checkpoint. check_every=0 turns this check off."
            )
        if rank == 0 and not self._has_told:
            logger.warning(
                "%s\nEvery rank trains a model of its own: call broadcast_parameters(model.state_dict(), 0, transport) "
                "before the first step.",
                differ,
            )
        self._has_told = True

    def _judge_gradients(self, packed: Sequence[Tensor]) -> None:
        """Gradients that are equal before they are averaged are a mistake. Communication: collective, all ranks."""
        # What is packed may hold a weight decay, which is equal on all ranks, where there is no gradient.
        gradients = [local(p.grad) for _, p in self._named if p.grad is not None]
        is_zero = not any(bool((g._values() if g.is_sparse else g).any()) for g in gradients)
        are_equal = are_equal_everywhere(self._transport, packed, is_zero)
        if not are_equal or self._transport.rank > 0 or self._has_told_gradients:
            return
        self._has_told_gradients = True
        logger.warning(
            "in step %d the gradients of %d ranks are equal before they are averaged. Either the ranks read the same "
            "data: give each its share. Or something has averaged them already, which the ledger does not see: another "
            "optimizer's hook, or DistributedDataParallel, dense, which Accelerate, Trainer and Lightning use under "
            "torchrun. Then register hvd_sketch.ddp_hook, or run forward and backward passes inside model.no_sync(). "
            "check_every=0 turns this check off",
            *(self._lead.step_number, self._transport.size),
        )

    def check_root(self, root: int) -> None:
        """Every rank has a state that others can take over. Communication: none."""

    def take_over_state(self, root: int) -> None:
        """See :meth:`hvd_sketch.exchange.base.Exchange.take_over_state`. Communication: collective, all ranks."""
        for exchange in self._exchanges:
            exchange.take_over_state(root)

    def step_without_data(self) -> bool:
        """Take part in a step of the others; whether all ranks have run out of data. Communication: collective."""
        self.average(Report(done=True))
        return self.is_over

    def had_data(self) -> tuple[int, ...]:
        """The ranks that had data in the last step before all had run out of them. Communication: none."""
        return self.active

    def forget(self) -> None:
        """Zero momentum and residuals. Communication: none."""
        for exchange in self._exchanges:
            exchange.forget()

    def _by_kind(self) -> dict[str, Exchange]:
        return {route.kind: exchange for route, exchange in zip(self._routes, self._exchanges, strict=True)}

    def _layout(self) -> list[list[Any]]:
        """Kind, name and shape of every tensor, in the order of the vectors."""
        return [
            [route.kind, self._named[number][0], list(local(self._named[number][1]).shape)]
            for route in self._routes
            for number in route.numbers
        ]

    def state_dict(self, consolidated: bool = False) -> dict[str, Any]:
        """The states of both exchanges, the layout they belong to, and what was sent so far."""
        states = {kind: exchange.state_dict(consolidated) for kind, exchange in self._by_kind().items()}
        by_kind = {"sketched": states.get("sketched"), "dense": states.get("dense")}
        return {"layout": self._layout(), **by_kind, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; see :meth:`read_state`."""
        self.read_state(state)()

    def read_state(self, state: object) -> Callable[[], None]:
        """Check a state; the function returned takes it over, and cannot fail.

        Raises ValueError where it was saved for other tensors, or is damaged.
        """
        saved = SavedState(state, self._transport.rank)
        layout = [list(tensor) for tensor in saved.entry("layout", (list, tuple))]
        if layout != self._layout():
            pairs = enumerate(zip_longest(layout, self._layout()))
            at, (theirs, ours) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint was saved for other tensors: tensor {at} is {theirs} there and {ours} here. "
                f"Build the optimizer with the same names, order and dense_below; {WITHOUT_RESIDUALS}"
            )
        loads = [exchange.read_state(saved.entry(kind, Mapping)) for kind, exchange in self._by_kind().items()]
        if saved.has("ledger"):  # older states have none
            loads.append(self.ledger.read_state(saved.entry("ledger", Mapping)))

        def take_over() -> None:
            self._begun = 0
            for load in loads:
                load()

        return take_over

    def __repr__(self) -> str:
        return ", ".join(f"{exchange.dim} coordinates {kind}" for kind, exchange in self._by_kind().items())
