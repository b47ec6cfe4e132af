"""What the options of ``hvd-sketch plan`` mean: the shapes of a model, a network."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hvd_sketch.at_ratio import Shapes, elements_of
from hvd_sketch.checks import check_choice
from hvd_sketch.config import SketchConfig
from hvd_sketch.cost import Network
from hvd_sketch.measured_costs import CARRIERS
from hvd_sketch.units import bits_per_s, seconds

LEAST_SIDE = 1000  # of the matrices of a model of which only the size is known; also how many of them, at most


def shapes_of_size(dim: int) -> Shapes:
    """Square matrices of a thousand columns, and what is left over, with so many elements in all.

    From 10^9 elements on the matrices grow, as those of models do, not their number.
    """
    side = max(LEAST_SIDE, math.isqrt(dim // LEAST_SIDE))
    whole, rest = divmod(dim // side, side)
    last = dim % side
    return [(side, side)] * whole + [(rest, side)] * (rest > 0) + [(last,)] * (last > 0)


class Tensors(NamedTuple):
    """Shapes of those of a model that are compressed, and of those that go dense beside single coordinates."""

    compressed: Shapes
    small: Shapes = ()


def tensors_of_model(factory: str) -> Tensors:
    """Of the model that a function of no arguments makes.

    Args:
        factory: ``package.module:function``; looked for from the current folder, too.

    Raises:
        ValueError: there is no such function, it fails, or what it makes is no model.
    """
    from hvd_sketch.model.parameters import is_dense  # not before: it imports torch

    module, _, name = factory.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    expected = "package.module:function"
    try:
        make = getattr(importlib.import_module(module), name)
        expected = "a function of no arguments that returns an nn.Module whose shapes are known"
        tensors = [parameter for parameter in make().parameters() if parameter.requires_grad]
    except (Exception, SystemExit) as error:  # the user's own code raises whatever it likes
        told = f"--model {factory} made no model ({type(error).__name__}: {error}): expected {expected}"
        raise ValueError(told) from error
    finally:
        sys.path.pop(0)
    shapes: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}  # by whether they go dense
    for tensor in tensors:
        shapes[is_dense(tensor, SketchConfig.dense_below)].append(tuple(tensor.shape))
    if not shapes[False]:
        raise ValueError(f"--model {factory}: no tensor is large enough to be compressed; exchange it dense")
    return Tensors(shapes[False], [shape for shape in shapes[True] if math.prod(shape)])


def tensors_of(params: float | None, model: str | None, gradient: Tensor | None = None) -> Tensors:
    """Of a model, or of one of so many parameters, all of which are compressed. Raises ValueError.

    Args:
        gradient: float [dim], a saved one, which says in place of ``params`` how many there are.
    """
    if gradient is not None and params is None:
        tensors = Tensors(shapes_of_size(gradient.numel())) if model is None else tensors_of_model(model)
        dim = elements_of(tensors.compressed)
        if dim != gradient.numel():
            raise ValueError(
                f"--gradient has {gradient.numel():,} elements, the tensors of --model that are compressed {dim:,}: "
                "save it by hvd_sketch.save_gradient(model.parameters(), FILE)"
            )
        return tensors
    if (params is None) == (model is None) or gradient is not None:
        raise ValueError("give one of --params 90e6 and --model package.module:function; with --gradient no --params")
    if model is not None:
        return tensors_of_model(model)
    if params is None or not 1 <= params < 1e13 or params != int(params):
        raise ValueError(f"--params must be a whole number of at least 1, such as 90e6, got {params}")
    return Tensors(shapes_of_size(int(params)))


def network_of(ranks: int, bandwidth: str, latency: str, launcher: str, per_host: int = 1) -> Network:
    """What the options describe: one rank of every host has a link. Raises ValueError."""
    check_choice("--launcher", launcher, CARRIERS)
    if ranks % per_host or ranks < 2 * per_host:
        raise ValueError(f"--ranks must be at least two hosts of --per-host {per_host} each, got {ranks}")
    return Network(ranks // per_host, bits_per_s(bandwidth) / 8, seconds(latency), CARRIERS[launcher], per_host)


def check_together(measured: Sequence[str], per_host: int, every: int) -> None:
    """Refuse options that do not go together. Raises ValueError.

    Args:
        measured: options that were given, though ``--measure`` finds what they say.
    """
    if measured:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in measured)
        raise ValueError(f"--measure finds what {names} would say: leave out either")
    if per_host > 1 and every > 1:
        raise ValueError("give one of --per-host (levels=2) and --every (LocalSteps): no optimizer has both")
