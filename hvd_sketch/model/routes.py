"""Which exchange every parameter of a model goes through, and what builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Unpack

import torch
from torch import Tensor

from hvd_sketch.config import ALL_DENSE, Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.base import Exchange, Options, Ranges, SparseUpdate
from hvd_sketch.exchange.dense import DenseAllreduce
from hvd_sketch.exchange.low_rank import LowRankAllreduce
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.exchange.sketched import SketchedAllreduce
from hvd_sketch.model.flat_parameters import FlatParameters
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.optim import LagAdamW
from hvd_sketch.shards import local
from hvd_sketch.transport.base import Transport


class MakeExchange(Protocol):
    """How the exchange of the large tensors is built. Communication: collective."""

    def __call__(
        self, config: Any, dim: int, transport: Transport, device: torch.device, **options: Unpack[Options]
    ) -> Exchange: ...


EXCHANGES: dict[type, MakeExchange] = {SketchConfig: SketchedAllreduce, LowRankConfig: LowRankAllreduce}


def make_exchange(
    config: Compression, dim: int, transport: Transport, device: torch.device, **options: Unpack[Options]
) -> Exchange:
    """The exchange that a configuration is of. Communication: collective."""
    return EXCHANGES[type(config)](config, dim, transport, device, **options)


@dataclass(frozen=True)
class Route:
    """The parameters of a model whose gradients go through one exchange."""

    kind: Literal["sketched", "dense"]
    flat: FlatParameters  # the parameters as one vector
    numbers: Sequence[int]  # of the parameters among all of the model

    def used(self, used: Sequence[bool]) -> tuple[list[bool], Ranges]:
        """Which of these parameters are used, of a list for all of the model, and the coordinates of the others."""
        own = [used[number] for number in self.numbers]
        return own, self.flat.unused(own)

    def build(
        self,
        config: Compression | None,
        transport: Transport,
        options: Options,
        *,
        scale: float = 1.0,
        wire_dtype: torch.dtype | None = None,
        make: MakeExchange = make_exchange,
    ) -> Exchange:
        """The exchange of these parameters on one rank. Communication: collective.

        Args:
            config: of the exchange; None for a dense one without momentum.
            transport: this rank's end of the network.
            options: what both exchanges of a model share.
            scale: the update is multiplied by it afterwards, and must then fit the parameters' dtypes.
            wire_dtype: what a dense exchange sends; None: without ``config`` the parameters' own dtype if all have one
                of 16 bits, otherwise the dtype of its vector.
            make: builds the exchange where this is not the dense one; default: the one that ``config`` is of.
        """
        own: Options = {
            **options,
            "shapes": self.flat.shapes,
            "dense_bytes": self.flat.dense_bytes,
            "limits": self.flat.limits(scale),
            "name": self.flat.name,
        }
        where = self.flat.dim, transport, self.flat.device
        if self.kind == "dense":
            if config is None:  # no other exchange may take it along
                wire_dtype = wire_dtype or self.flat.half_dtype
            return DenseAllreduce(config, *where, dtype=self.flat.dtype, wire_dtype=wire_dtype, **own)
        assert config is not None, "without a config all is dense"
        return make(config, *where, **own)

    def unpack(self, update: SparseUpdate, used: Sequence[bool], scale: float = 1.0) -> None:
        """Set ``p.grad`` of these parameters to ``scale`` times an update; None where they are not used."""
        values: Tensor = update.values if scale == 1 else update.values * scale
        if update.indices is None:
            self.flat.unpack_dense(values, used)
        else:
            self.flat.unpack_sparse(update.indices, values, used)


def build_exchanges(
    routes: Sequence[Route], config: Compression | None, transport: Transport, options: Options, **others: Any
) -> list[Exchange]:
    """The exchanges of a model's routes on one rank, see :meth:`Route.build`. Communication: collective.

    The first agrees on every step. Where there are two, the dense one may travel in collectives of the first.
    """
    exchanges = [route.build(config, transport, options, **others) for route in routes]
    if len(exchanges) > 1 and isinstance(exchanges[0], ResidualExchange) and isinstance(exchanges[1], DenseAllreduce):
        exchanges[0].companion = exchanges[1]
    return exchanges


def unsent_of(routes: Sequence[Route], exchanges: Sequence[Exchange]) -> list[tuple[Tensor, Tensor]]:
    """Every parameter that is compressed, with its part of this rank's residual, float32 of what this rank holds."""
    pairs = [
        zip(route.flat.parameters, route.flat.views_of(exchange.residual), strict=True)
        for route, exchange in zip(routes, exchanges, strict=True)
        if isinstance(exchange, ResidualExchange)
    ]
    return [pair for of_route in pairs for pair in of_route]


def mark_sparse(optimizer: torch.optim.Optimizer, named: Sequence[NamedParameter], config: Compression | None) -> None:
    """Tell a ``LagAdamW`` which of its parameters get the gradient of a few coordinates in a step."""
    if isinstance(optimizer, LagAdamW):
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        dense_below = config.dense_below if isinstance(config, SketchConfig) else ALL_DENSE
        optimizer.mark_sparse(p for _, p in named if p in own and not is_dense(p, dense_below))


def routes_of(named: Sequence[NamedParameter], config: Compression | None) -> list[Route]:
    """Which parameters are sketched and which go dense: at most one route of each kind, the sketched one first.

    Args:
        named: at least one parameter.
        config: says which tensors are small; None: all go dense.
    """
    goes_dense = [config is None or is_dense(p, config.dense_below) for _, p in named]
    is_empty = [local(p).numel() == 0 for _, p in named]  # such as a shard of a small matrix
    kinds = {dense for dense, empty in zip(goes_dense, is_empty, strict=True) if not empty}
    if len(kinds) < 2:  # no route for what is empty alone; where all is empty a dense one, of the agreement alone
        goes_dense = [kinds.pop() if kinds else True] * len(named)
    sketched = [i for i, dense in enumerate(goes_dense) if not dense]
    dense = [i for i, dense in enumerate(goes_dense) if dense]
    routes = []
    if sketched:
        routes.append(Route("sketched", FlatParameters([named[i] for i in sketched], in_slices=True), sketched))
    if dense:
        pairs = [named[i] for i in dense]
        is_double = any(parameter.dtype == torch.float64 for _, parameter in pairs)
        routes.append(Route("dense", FlatParameters(pairs, dtype=torch.float64 if is_double else torch.float32), dense))
    return routes
