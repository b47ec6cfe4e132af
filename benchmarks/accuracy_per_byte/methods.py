"""The exchanges that are compared, each with what its authors combine it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch

from benchmarks.accuracy_per_byte.inner import Inner
from benchmarks.accuracy_per_byte.settings import Shape, local_count, powersgd_rank, true_count
from benchmarks.accuracy_per_byte.tasks import BASE_WORKERS, Kind, Task
from benchmarks.methods.allreduce import BrainFloat
from benchmarks.methods.demo import DeMo
from benchmarks.methods.powersgd import PowerSGD
from benchmarks.methods.top_k import CodedTopK, TrueTopK
from hvd_sketch import SketchConfig
from hvd_sketch.model.local_steps import nesterov
from hvd_sketch.model.parameters import NamedParameter, is_dense
from hvd_sketch.model.recommended import DENSE_BELOW
from hvd_sketch.simulate import Simulation

RESIDUAL_DECAY = 0.95  # before a sign step
EVERY = 16  # steps between two exchanges of parameters


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
            where something was sent. On text neither is used, but ``inner``.
        configure: the configuration of a place; None: dense.
        make: builds the exchange of a place; None: the library does.
        inner: what steps the language model. Other tasks have SGD, and only methods with ``"adam"`` here.
        every: 1: gradients are exchanged. More: the ranks take as many steps each by itself, and then exchange what has
            become of their parameters, by :class:`hvd_sketch.LocalSteps`.
        outer: makes the optimizer that ends a round; default: the library's own.
        ahead: gradients are those of parameters that ``optimizer.ahead()`` has moved.
        fixed_ratio: of a method whose bytes cannot be chosen.
        rate_factor: of the task's learning rate at which the search begins.
        trial: the part of a run, from its start, in which its bytes are measured beforehand, to be set right; at least
            a step. They are not those of the settings where ranks name the same coordinates, where a sketch finds a few
            more than k, where ranks of matrices are whole numbers. 0: they are.
        takes_all: it compresses the small tensors, too, so that its ratio is the whole model's.
        grows: its bytes grow with the ranks, and its ratio is met with :data:`BASE_WORKERS` of them.
        is_sent: False for one that exists in a simulation only, whose bytes are not measured.
    """

    title: str
    kind: Kind
    configure: Callable[[Place], Any]
    make: Callable[[Place], Any] | None = None
    trial: float = 0.0
    takes_all: bool = False
    grows: bool = False
    is_sent: bool = True
    inner: Inner = "adam"
    rate_factor: float = 1.0
    every: int = 1
    outer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] = nesterov
    ahead: bool = False
    fixed_ratio: float | None = None

    @property
    def is_for_text(self) -> bool:
        """Whether images do without it."""
        return self.inner != "adam" or self.every > 1 or self.ahead

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


def _counted(count: int, bits: int = 32, residual_decay: float = 1.0) -> SketchConfig:
    """Of a competitor, which takes k and the bits of it."""
    options = {"candidates": "random", "dense_below": DENSE_BELOW, "residual_decay": residual_decay}
    return SketchConfig(k=count, value_bits=bits, **options)


def _to_all(bits: int) -> Callable[[Place], SketchConfig]:
    """Of a competitor whose ranks each send as much to all others as with :data:`BASE_WORKERS` of them."""

    def configure(place: Place) -> SketchConfig:
        return _counted(local_count(place.ratio, place.dim, BASE_WORKERS, bits), bits, RESIDUAL_DECAY)

    return configure


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

        return LowRankConfig(ratio=place.ratio, value_bits=bits)

    return Method(f"low rank, {bits} bit", "nesterov", configure, trial=0.001, takes_all=True)


def _into(method: Method, title: str, inner: Inner, rate_factor: float = 1.0) -> Method:
    return replace(method, title=f"{method.title}, {title}", inner=inner, rate_factor=rate_factor)


def _ahead(method: Method) -> Method:
    return replace(method, title=f"{method.title}, ahead", ahead=True)


def _with_sgd(method: Method) -> Method:
    """With momentum where the exchange goes with it."""
    if method.kind == "nesterov":
        return _into(method, "SGD", "nesterov", 16)
    return _into(method, "SGD", "sgd", 128)


def _in_rounds(method: Method) -> Method:
    fixed = method.fixed_ratio * EVERY if method.fixed_ratio else None
    return replace(method, title=f"{method.title}, every {EVERY} steps", every=EVERY, fixed_ratio=fixed)


def _with_sign(method: Method, **overrides: Any) -> Method:
    configure = _sketched(residual_decay=RESIDUAL_DECAY, **overrides)
    return replace(method, title=f"{method.title}, sign step", configure=configure, inner="sign", rate_factor=2)


METHODS: dict[str, Method] = {
    "lowrank4": _low_rank(4),
    "nominate4": Method("nominated, 4 bit", "nesterov", _sketched(candidates="nominate"), trial=0.25),
    "sketch4": Method("sketch, 4 bit", "plain", _sketched(), trial=0.25),
    "random4": Method("random, 4 bit", "plain", _sketched(candidates="random")),
    "dense": Method("dense", "nesterov", lambda place: None, fixed_ratio=1.0),
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
METHODS |= {f"{name}-lag": _into(METHODS[name], "LagAdamW", "lag") for name in ("nominate4", "sketch4", "random4")}
METHODS |= {
    "nominate4-sign": _with_sign(METHODS["nominate4"], candidates="nominate"),
    "sketch4-sign": _with_sign(METHODS["sketch4"]),
    "random4-sign": _with_sign(METHODS["random4"], candidates="random"),
}
METHODS |= {
    "lowrank16": _low_rank(16),
    "dense16": Method(
        "dense, bf16", "nesterov", lambda place: _counted(1), lambda place: BrainFloat, trial=0.001, fixed_ratio=2.0
    ),
    "demo": Method(
        "DeMo, 16 bit", "plain", _to_all(16), lambda place: DeMo, 0.001, grows=True, inner="sign", rate_factor=2
    ),
    "sparseloco": Method(
        f"SparseLoCo-like: local top-k, 4 bit, every {EVERY} steps",
        "plain",
        _to_all(4),
        lambda place: CodedTopK,
        grows=True,
        every=EVERY,
        outer=partial(torch.optim.SGD, lr=1.0),
    ),
}
METHODS |= {f"{name}-rounds": _in_rounds(METHODS[name]) for name in ("dense", "nominate4", "lowrank4")}
AHEAD = tuple(f"{name}-ahead" for name in ("lowrank4", "nominate4", "nominate4-lag", "sketch4-lag", "random4-lag"))
METHODS |= {name: _ahead(METHODS[name.removesuffix("-ahead")]) for name in AHEAD}
CROSSED = ("dense", "lowrank4", "nominate4", "sketch4", "random4")  # with every inner optimizer
METHODS |= {f"{name}-sgd": _with_sgd(METHODS[name]) for name in CROSSED}
METHODS |= {f"{name}-muon": _into(METHODS[name], "Muon", "muon", 0.5) for name in CROSSED}
METHODS |= {f"{name}-lion": _into(METHODS[name], "Lion", "lion", 0.25) for name in CROSSED}
FIRST = ("lowrank4", "nominate4", "sketch4", "random4", "dense", "local4", "local8")  # in every plan
