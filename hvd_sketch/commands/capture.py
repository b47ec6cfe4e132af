"""How much of a saved gradient each way to compress captures at equal bytes, and which settings capture most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hvd_sketch.at_ratio import Shapes, configurations, title_of
from hvd_sketch.commands.calls import as_call
from hvd_sketch.config import Compression, SketchConfig
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import local_transports

ROWS = (1, 3, 5, 7)
TABLE_SHARES = (0.25, 0.5, 0.75)  # of the bytes
OVERSAMPLES = (2, 4, 8)
DIVIDED = ("rows", "cols", "k", "oversample")  # what is tried; all else is the method's
LOW_RANK_STEPS = 3  # it begins with random factors, and goes on from those of the step before
NUMPY = b"\x93NUMPY"  # how its files begin
SAVE = "hvd_sketch.save_gradient(model.parameters(), FILE)"
NOTE = (
    "Of one step, rounding to few bits included; training sends the rest in later steps. Nominations are taken to be "
    "the largest of this gradient, which is their upper bound: ranks know their own gradients only."
)


@dataclass(frozen=True)
class Captured:
    """What one configuration captures.

    Attributes:
        name: of the method, as in :func:`hvd_sketch.cost.methods`.
        title: for a table.
        config: at the bytes that were asked for.
        energy: ``1 - |g - sent|^2 / |g|^2`` of a step.
    """

    name: str
    title: str
    config: Compression
    energy: float

    def as_record(self) -> dict[str, Any]:
        """For programs."""
        return {"method": self.name, "energy": self.energy, "config": asdict(self.config)}


def load_gradient(path: Path) -> Tensor:
    """A flat gradient from a file: float32 [dim].

    Args:
        path: of a tensor that ``torch.save`` wrote, or of an array in NumPy's ``.npy``; nothing in it is run.

    Raises:
        ValueError: the file holds no finite vector of floats, or only zeros.
    """
    try:
        with path.open("rb") as file:
            is_numpy = file.read(len(NUMPY)) == NUMPY  # whatever its suffix is: save_gradient takes any
        if is_numpy:
            loaded: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        raise ValueError(f"--gradient {path} cannot be read ({type(error).__name__}): write it by {SAVE}") from error
    if not isinstance(loaded, Tensor) or loaded.ndim != 1 or not loaded.is_floating_point():
        what = f"{loaded.dtype} {list(loaded.shape)}" if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ValueError(f"--gradient {path} must hold one vector of floats, got {what}: write it by {SAVE}")
    gradient = loaded.detach().float().contiguous()
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        raise ValueError(f"--gradient {path} must be finite and not all zero")
    return gradient


class Comparison:
    """Of every method the settings that capture most of a gradient at one ratio.

    Args:
        gradient: float32 [dim]; every rank is taken to have it.
        shapes: of the tensors that make it up; None: they are not known, and low rank is not judged.
        ratio: bytes of a dense ring over those of a step.
        ranks: how many share the bytes.
        bits: of a value.
        can_split: whether the transport can be split, so that many ranks form a grid.

    Attributes:
        best: of each method, the one that captures most first.

    Communication: none.
    """

    def __init__(
        self,
        gradient: Tensor,
        shapes: Shapes | None,
        ratio: float,
        ranks: int,
        bits: int = 4,
        can_split: bool = True,
    ) -> None:
        best: dict[str, Captured] = {}
        every_shape = shapes or [tuple(gradient.shape)]
        plain = configurations(every_shape, ratio, ranks, bits, can_split=can_split)
        at_ratio = partial(SketchConfig.for_wire_ratio, ratio, gradient.numel(), ranks, can_split)
        for name, config in _candidates(plain, at_ratio, ranks, shapes is not None):
            title = title_of(name, config, ratio, every_shape, ranks, can_split)
            captured = Captured(name, title, config, energy_captured(config, gradient, shapes))
            if name not in best or captured.energy > best[name].energy:
                best[name] = captured
        self.best = sorted(best.values(), key=lambda captured: -captured.energy)
        self._has_shapes = shapes is not None

    def as_record(self) -> dict[str, Any]:
        """For programs."""
        return {"captured": [captured.as_record() for captured in self.best]}

    def show(self, console: Console) -> None:
        """A table that fits 80 columns, the best tables' settings to copy, and what is not judged."""
        table = Table(title="Energy of the gradient that a step captures at equal bytes")
        table.add_column("method")
        for heading in ("energy", "rows", "cols", "k", "oversample"):
            table.add_column(heading, justify="right")
        for captured in self.best:
            table.add_row(captured.title, f"{captured.energy:.1%}", *_told(captured.config))
        console.print(table)
        for captured in self.best:
            if isinstance(captured.config, SketchConfig) and captured.config.has_table:
                console.print(f"{captured.title}: {as_call(captured.config)}", soft_wrap=True)  # one line to copy
        if not self._has_shapes:
            console.print("Low rank is not judged: it needs the shapes of the tensors, by --model.")
        console.print(NOTE)


def _candidates(
    plain: Mapping[str, Compression], at_ratio: Callable[..., SketchConfig], ranks: int, has_shapes: bool
) -> Iterator[tuple[str, Compression]]:
    """Every configuration that is tried, of equal bytes: ``plain`` by method, and other divisions of its tables."""
    for name, config in plain.items():
        if not isinstance(config, SketchConfig):
            if has_shapes:
                yield name, config
        elif not config.has_table:
            yield name, config
        else:
            yield from ((name, other) for other in _tables(config, at_ratio, ranks))


def _tables(config: SketchConfig, at_ratio: Callable[..., SketchConfig], ranks: int) -> Iterator[SketchConfig]:
    """Other divisions of the same bytes among rows, columns and coordinates."""
    kept = {name: value for name, value in asdict(config).items() if name not in DIVIDED}
    cells = 2 * config.rows * config.cols  # in all of the bytes: half of them go to the table
    for rows in ROWS:
        for share in TABLE_SHARES:
            for oversample in OVERSAMPLES if config.chooses else (1,):
                cols = max(int(share * cells / rows), ranks)
                try:
                    yield at_ratio(rows=rows, cols=cols, oversample=oversample, **kept)
                except ValueError:  # a division that leaves no coordinate
                    continue


def energy_captured(config: Compression, gradient: Tensor, shapes: Shapes | None) -> float:
    """``1 - |g - sent|^2 / |g|^2`` of a step of the exchange itself, without momentum, all ranks with one gradient."""
    steps = LOW_RANK_STEPS
    if isinstance(config, SketchConfig):
        config, steps = replace(config, momentum=0.0), 1
    (alone,) = local_transports(1)
    exchange = make_exchange(
        config, gradient.numel(), alone, torch.device("cpu"), shapes=shapes or [tuple(gradient.shape)]
    )
    for _ in range(steps):
        exchange.residual.zero_()
        update = exchange.step(gradient.clone())
    rest = gradient.double()
    if update.indices is None:
        rest -= update.values
    else:
        rest[update.indices] -= update.values.double()
    return 1 - float(rest.square().sum() / gradient.double().square().sum())


def _told(config: Compression) -> list[str]:
    if not isinstance(config, SketchConfig):
        return ["", "", "", ""]
    table = [str(config.rows), f"{config.cols:,}"] if config.has_table else ["", ""]
    return [*table, f"{config.k:,}", str(config.oversample) if config.has_table else ""]
