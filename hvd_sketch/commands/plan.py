"""``hvd-sketch plan``: does compression pay on this network, for this model?"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from hvd_sketch.checks import check_choice, check_positive
from hvd_sketch.config import LowRankConfig
from hvd_sketch.cost import CARRIERS, Method, Network, Shapes, break_even, methods

COLUMNS = MOST_ROWS = 1000  # of the matrices of a model of which only the size is known
MUCH = 1.1  # times the other's time: less than that is within the model's error
ADVISED = ("lowrank", "nominate")  # what trains best at equal bytes, see hvd_sketch.recommended
SCALES = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def bits_per_s(text: str) -> float:
    """A bandwidth such as ``1gbit``, in bits per second. Raises ValueError."""
    return _with_unit(text, SCALES, "a bandwidth such as 100mbit or 1gbit")


def seconds(text: str) -> float:
    """A time such as ``50us``, in seconds. Raises ValueError."""
    return _with_unit(text, TIMES, "a time such as 50us, 3ms or 0.2s", least=0.0)


def _with_unit(text: str, units: Mapping[str, float], expected: str, least: float = 1e-12) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+?)(?:/s|ps)?\s*", text.lower())
    try:
        value = float(found[1]) * units[found[2]] if found else math.nan
    except (KeyError, ValueError):
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"expected {expected}, got {text!r}")
    return value


def shapes_of_size(dim: int) -> Shapes:
    """Matrices of a thousand columns with so many elements in all."""
    columns = COLUMNS if dim >= COLUMNS else 1
    whole, rest = divmod(dim // columns, MOST_ROWS)
    return [(MOST_ROWS, columns)] * whole + [(rest, columns)] * (rest > 0)


def shapes_of_model(factory: str) -> Shapes:
    """Of the tensors that are compressed, of the model that a function of no arguments makes.

    Args:
        factory: ``package.module:function``; looked for from the current folder, too.

    Raises:
        ValueError: there is no such function, it fails, or what it makes is no model.
    """
    from hvd_sketch.model.parameters import is_dense  # not before: it imports torch

    module, _, name = factory.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), name)()
        tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    except Exception as error:  # the user's own code raises whatever it likes
        raise ValueError(
            f"--model {factory} made no model ({type(error).__name__}: {error}): expected package.module:function"
        ) from error
    finally:
        sys.path.pop(0)
    shapes = [tuple(tensor.shape) for tensor in tensors if not is_dense(tensor, LowRankConfig.dense_below)]
    if not shapes:
        raise ValueError(f"--model {factory}: no tensor is large enough to be compressed; exchange it dense")
    return shapes


def shapes_of(params: float | None, model: str | None, gradient: Tensor | None = None) -> Shapes:
    """Of the tensors that are compressed: of a model, or of one of so many parameters. Raises ValueError.

    Args:
        gradient: float [dim], a saved one, which says in place of ``params`` how many there are.
    """
    if gradient is not None and params is None:
        shapes = shapes_of_size(gradient.numel()) if model is None else shapes_of_model(model)
        dim = sum(map(math.prod, shapes))
        if dim != gradient.numel():
            raise ValueError(
                f"--gradient has {gradient.numel():,} elements, the tensors of --model that are compressed {dim:,}: "
                "save the gradients of these alone, in the model's order"
            )
        return shapes
    if (params is None) == (model is None) or gradient is not None:
        raise ValueError("give one of --params 90e6 and --model package.module:function; with --gradient no --params")
    if model is not None:
        return shapes_of_model(model)
    if params is None or not 1 <= params < 1e13 or params != int(params):
        raise ValueError(f"--params must be a whole number of at least 1, such as 90e6, got {params}")
    return shapes_of_size(int(params))


def network_of(ranks: int, bandwidth: str, latency: str, launcher: str) -> Network:
    """What the options describe. Raises ValueError."""
    check_choice("--launcher", launcher, CARRIERS)
    return Network(ranks, bits_per_s(bandwidth) / 8, seconds(latency), CARRIERS[launcher])


class Plan:
    """What every method is predicted to take, and what to do.

    Args:
        shapes: of the tensors that are compressed.
        network: of the job.
        ratio: times fewer bytes than a dense ring.
        backward_s: what a step takes without its exchange.
        nanoseconds: local work by method, see :data:`hvd_sketch.cost.NANOSECONDS`.

    Raises:
        ValueError: the ratio is not positive, or leaves no coordinate.
    """

    def __init__(
        self, shapes: Shapes, network: Network, ratio: float, backward_s: float, nanoseconds: Mapping[str, float]
    ) -> None:
        check_positive("--ratio", ratio)
        self._dim, self._network, self._ratio = sum(map(math.prod, shapes)), network, ratio
        self._backward_s = backward_s
        self.methods = methods(shapes, ratio, network, nanoseconds)
        self._dense = min((self.methods["dense"], self.methods["bf16"]), key=self.step_s)
        self._peer = self.methods["powersgd"]  # local top-k grows with the ranks, and trains worse
        self._best = min((self.methods[name] for name in ADVISED if name in self.methods), key=self.step_s)

    def step_s(self, method: Method) -> float:
        """Of a step: the backward pass, then the exchange."""
        return self._backward_s + method.seconds(self._network)

    @property
    def advice(self) -> str:
        """One sentence: what to do, and why."""
        best, dense, peer = self._best, self._dense, self._peer
        gain = self.step_s(dense) / self.step_s(best)
        # The bandwidth of a network that was measured is not known by itself.
        is_rate_known = math.isfinite(self._network.bytes_per_s)
        pays = f" It pays below {told_rate(self._break_even())}." if is_rate_known else ""
        if MUCH * self.step_s(peer) < min(self.step_s(best), self.step_s(dense)):
            faster = self.step_s(peer) / self.step_s(best)
            return f"Use {peer.title}: its step takes {faster:.0%} of the time of {best.title}, the faster of ours."
        if gain < MUCH:
            return f"Stay dense: with {best.title} a step is {gain:.2f} times as fast.{pays}"
        return f"Compress: with {best.title} a step is {gain:.1f} times as fast as with {dense.title}.{pays}"

    def _break_even(self) -> float:
        return break_even(self._best, self._network, [self.methods["dense"], self.methods["bf16"]])

    def as_record(self) -> dict[str, Any]:
        """For programs: seconds and bytes of every method, the advice, the bandwidth in bits per second."""
        rate = 8 * self._break_even() if math.isfinite(self._network.bytes_per_s) else math.inf
        return {
            "coordinates": self._dim,
            "ranks": self._network.ranks,
            "ratio": self._ratio,
            "advice": self.advice,
            "break_even_bits_per_s": rate if math.isfinite(rate) else None,
            "methods": {
                name: {
                    "exchange_s": method.seconds(self._network),
                    "step_s": self.step_s(method),
                    "local_s": method.local_s,
                    "collectives": method.collectives,
                    "sent_bytes": method.sent_bytes,
                    "received_bytes": method.received_bytes,
                    "kept_bytes": method.kept_bytes,
                }
                for name, method in self.methods.items()
            },
        }

    def show(self, console: Console) -> None:
        """A table that fits 80 columns, and the advice."""
        table = Table(title=f"{self._dim:,} coordinates, {self._network.ranks} ranks, ours at {self._ratio:g}x")
        table.add_column("method")
        for heading in ("sent", "exchange", "step", "against dense", "memory"):
            table.add_column(heading, justify="right")
        dense_s = self.step_s(self._dense)
        for method in sorted(self.methods.values(), key=self.step_s):
            table.add_row(
                method.title,
                told_bytes(method.sent_bytes),
                told_seconds(method.seconds(self._network)),
                told_seconds(self.step_s(method)),
                f"{dense_s / self.step_s(method):.2f}x",
                told_bytes(method.kept_bytes),
                style="bold" if method in (self._best, self._dense) else None,
            )
        console.print(table)
        console.print(self.advice)


def told_seconds(value: float) -> str:
    """Three digits, in the unit that fits."""
    return _told(value, {"s": 1.0, "ms": 1e-3, "us": 1e-6})


def told_bytes(value: float) -> str:
    """Three digits, in the unit that fits."""
    return _told(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0})


def _told(value: float, units: Mapping[str, float]) -> str:
    smallest = min(units.items(), key=lambda unit: unit[1])
    name, scale = next((unit for unit in units.items() if value >= 0.9995 * unit[1]), smallest)
    return f"{value / scale:#.3g}".rstrip(".") + f" {name}"


def told_rate(bytes_per_s: float) -> str:
    """A bandwidth as people write it."""
    if not 0 < bytes_per_s < math.inf:
        return "any bandwidth" if bytes_per_s else "no bandwidth"
    return _told(8 * bytes_per_s, {"Gbit/s": 1e9, "Mbit/s": 1e6})
