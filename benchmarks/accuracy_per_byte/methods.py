"""The exchanges that are compared, each with what its authors combine it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch

from benchmarks.accuracy_per_byte.settings import Shape, local_count, powersgd_rank, true_count
from benchmarks.accuracy_per_byte.tasks import DENSE_BELOW, Inner, Kind, Task
from benchmarks.methods.powersgd import PowerSGD
from benchmarks.methods.top_k import CodedTopK, TrueTopK
from hvd_sketch import SketchConfig
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.simulate import Simulation

RESIDUAL_DECAY = 0.95  # before a sign step


@dataclass(frozen=True)
class Place:
    """Where an exchange is used: the matrices that it compresses, how many ranks, and how many times fewer bytes.

    ``seed`` is that of hashes, random coordinates and first factors.
    """

    shapes: Sequence[Shape]
    ranks: int
    ratio: float
    seed: int = 0

    @property
    def dim(self) -> int:
        """Elements of the matrices."""
        return sum(map(prod, self.shapes))


@dataclass(frozen=True)
class Method:
    """An exchange.

    Attributes:
        title: for people.
        kind: where the momentum of 0.9 is. ``"nesterov"``: in the optimizer. ``"masked"``: before the exchange, zeroed
            where something was sent. With Adam neither is used.
        configure: the configuration of a place; None: dense.
        make: builds the exchange of a place; None: the library does.
        inner: what steps the language model. Other tasks have SGD, and only methods with ``"adam"`` here.
        rate_factor: of the task's learning rate at which the search begins.
        trial: the part of a run, from its start, in which its bytes are measured beforehand, to be set right; at least
            a step. They are not those of the settings where ranks name the same coordinates, where a sketch finds a few
            more than k, where ranks of matrices are whole numbers. 0: they are.
        is_sent: False for one that exists in a simulation only, whose bytes are not measured.
    """

    title: str
    kind: Kind
    configure: Callable[[Place], Any]
    make: Callable[[Place], Any] | None = None
    trial: float = 0.0
    is_sent: bool = True
    inner: Inner = "adam"
    rate_factor: float = 1.0

    def first_rate(self, task: Task, steps: int) -> float:
        """In the middle of the first grid of a training's learning rates."""
        return task.centre(self.kind, steps) * self.rate_factor

    def config(self, place: Place, adam: bool = False) -> Any:
        """Of the exchange; None: dense."""
        config = self.configure(place)
        if config is None:
            return None
        momentum = {"momentum": 0.9} if self.kind == "masked" and not adam else {}
        return replace(config, seed=place.seed, **momentum)

    def simulate(self, named: Sequence[NamedParameter], place: Place, adam: bool = False) -> Simulation:
        """All ranks' exchanges of one model's gradients."""
        options = {"make": self.make(place)} if self.make else {}
        return Simulation(named, self.config(place, adam), place.ranks, **options)


def place_of(named: Sequence[NamedParameter], ranks: int, ratio: float, seed: int) -> Place:
    """For a model."""
    return Place([tuple(p.shape) for p in matrices(named)], ranks, ratio, seed)


def matrices(named: Sequence[NamedParameter]) -> list[torch.Tensor]:
    """The parameters that are compressed."""
    return [parameter for _, parameter in named if not is_dense(parameter, DENSE_BELOW)]


def _sketched(**overrides: Any) -> Callable[[Place], SketchConfig]:
    def configure(place: Place) -> SketchConfig:
        return SketchConfig.for_wire_ratio(place.ratio, place.dim, place.ranks, dense_below=DENSE_BELOW, **overrides)

    return configure


def _counted(count: int, bits: int = 32) -> SketchConfig:
    """Of a competitor, which takes k and the bits of it."""
    return SketchConfig(k=count, value_bits=bits, candidates="random", dense_below=DENSE_BELOW)


def _local(bits: int) -> Method:
    return Method(
        f"local top-k, {bits} bit (DGC)",
        "masked",
        lambda place: _counted(local_count(place.ratio, place.dim, place.ranks, bits), bits),
        lambda place: CodedTopK,
    )


def _powersgd(value_bytes: int, dtype: torch.dtype | None) -> Method:
    def make(place: Place) -> Any:
        rank = powersgd_rank(place.ratio, place.shapes, place.ranks, value_bytes)
        return partial(PowerSGD, rank=rank, wire_dtype=dtype)

    return Method(f"PowerSGD of torch, {8 * value_bytes} bit", "nesterov", lambda place: _counted(1), make)


def _low_rank(bits: int) -> Method:
    def configure(place: Place) -> Any:
        from hvd_sketch.config import LowRankConfig

        return LowRankConfig(ratio=place.ratio, value_bits=bits, dense_below=DENSE_BELOW)

    return Method(f"low rank, {bits} bit", "nesterov", configure, trial=0.001)


def _with_lag(method: Method) -> Method:
    return replace(method, title=f"{method.title}, LagAdamW", inner="lag")


def _with_sign(method: Method, **overrides: Any) -> Method:
    configure = _sketched(residual_decay=RESIDUAL_DECAY, **overrides)
    return replace(method, title=f"{method.title}, sign step", configure=configure, inner="sign", rate_factor=2)


METHODS: dict[str, Method] = {
    "lowrank4": _low_rank(4),
    "nominate4": Method("nominated, 4 bit", "nesterov", _sketched(candidates="nominate"), trial=0.25),
    "sketch4": Method("sketch, 4 bit", "plain", _sketched(), trial=0.25),
    "random4": Method("random, 4 bit", "plain", _sketched(candidates="random")),
    "dense": Method("dense", "nesterov", lambda place: None),
    "local4": _local(4),
    "local8": _local(8),
    "lowrank8": _low_rank(8),
    "local32": _local(32),
    "paper": Method(
        "the paper's sketch, 32 bit, P = 4",
        "plain",
        _sketched(oversample=4, value_bits=32, table_bits=32),
        trial=0.25,
    ),
    "powersgd16": _powersgd(2, torch.float16),
    "powersgd32": _powersgd(4, None),
    "truetopk": Method(
        "true top-k, 32 bit",
        "nesterov",
        lambda place: _counted(true_count(place.ratio, place.dim, place.ranks)),
        lambda place: TrueTopK,
        is_sent=False,
    ),
}
METHODS |= {f"{name}-lag": _with_lag(METHODS[name]) for name in ("nominate4", "sketch4", "random4")}
METHODS |= {
    "nominate4-sign": _with_sign(METHODS["nominate4"], candidates="nominate"),
    "sketch4-sign": _with_sign(METHODS["sketch4"]),
    "random4-sign": _with_sign(METHODS["random4"], candidates="random"),
}
FIRST = ("lowrank4", "nominate4", "sketch4", "random4", "dense", "local4", "local8")  # in every plan
