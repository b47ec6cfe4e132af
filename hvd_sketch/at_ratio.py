"""Our ways to average a gradient, at one ratio of bytes: settings, titles, bytes, memory, collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from hvd_sketch.config import Compression, LowRankConfig, SketchConfig
from hvd_sketch.exchange.candidates.sketch import CELLS_TOGETHER
from hvd_sketch.exchange.matrices import as_matrices, factor_bytes, least_bytes, within_bytes
from hvd_sketch.kernels.selection import looks
from hvd_sketch.wire_bytes import DENSE_BYTES, step_bytes

Shapes = Sequence[tuple[int, ...]]
COLLECTIVES = {"nominate": 3, "random": 2, "lowrank": 5, "sketch": 5, "heavymix": 6, "paper": 6}  # with a small table
TITLES = {
    "lowrank": "low rank, {} bit",
    "nominate": "nominated, {} bit",
    "random": "random, {} bit",
    "sketch": "sketch, {} bit",
    "heavymix": "HEAVYMIX, {} bit",
    "paper": "the paper's sketch",
}


def elements_of(shapes: Shapes) -> int:
    """Of tensors of these shapes."""
    return sum(map(prod, shapes))


def title_of(name: str, config: Compression, ratio: float, shapes: Shapes, ranks: int, can_split: bool = True) -> str:
    """Of a configuration, for a table; it says the ratio that low rank reaches where that is lower."""
    title = TITLES[name].format(config.value_bits)
    if not isinstance(config, LowRankConfig):
        return title
    reached = DENSE_BYTES * elements_of(shapes) / bytes_of(config, shapes, ranks, can_split)
    return title if reached >= 0.995 * ratio else f"{title}, {reached:{'.3g' if reached < 1000 else '.0f'}}x"


def configurations(
    shapes: Shapes, ratio: float, ranks: int, bits: int = 4, small: Shapes = (), can_split: bool = True
) -> dict[str, Compression]:
    """Ours at one ratio, those that can reach it; low rank at the highest ratio that it reaches, if that is lower.

    Args:
        bits: of a value and of a table's cell; the paper's sketch has 32 always.
        small: tensors that low rank takes, too, and that go dense beside single coordinates.
        can_split: whether the transport can be split, so that many ranks form a grid.
    """
    dim, every_shape = elements_of(shapes), [*shapes, *small]
    dense_bytes = DENSE_BYTES * elements_of(every_shape)
    highest = LowRankConfig(ratio=dense_bytes / least_bytes(every_shape, bits), value_bits=bits)
    low_rank = within_bytes(every_shape, dense_bytes / ratio, ranks if can_split else 1, bits) or highest
    found: dict[str, Compression] = {"lowrank": low_rank}
    settings: dict[str, dict[str, Any]] = {
        "nominate": {"candidates": "nominate"},
        "random": {"candidates": "random"},
        "sketch": {"table_bits": bits},
        "heavymix": {"candidates": "heavymix", "table_bits": bits},
        "paper": {"oversample": 4, "value_bits": 32, "table_bits": 32, "momentum": 0.9},
    }
    for name, own in settings.items():
        try:
            config = SketchConfig.for_wire_ratio(ratio, dim, ranks, can_split, **{"value_bits": bits, **own})
        except ValueError:  # a ratio that leaves no coordinate
            continue
        found[name] = config if config.has_table else replace(config, cols=0)
    return found


def bytes_of(config: Compression, shapes: Shapes, ranks: int, can_split: bool = True) -> float:
    """Ring bytes of a step of one exchange."""
    if isinstance(config, SketchConfig):
        return step_bytes(config, elements_of(shapes), ranks, can_split)
    return factor_bytes(shapes, config, ranks if can_split else 1)  # they depend on ranks in a grid alone


def kept_bytes(config: Compression, shapes: Shapes, device: str = "cpu") -> float:
    """Memory that an exchange keeps from step to step: residual, momentum, right factors, the table.

    On a CPU low rank also keeps the memory of its update.
    """
    residual = 4 * elements_of(shapes)
    if isinstance(config, LowRankConfig):
        return residual * (2 if device == "cpu" else 1) + 4 * sum(m.rank * m.cols for m in as_matrices(shapes, config))
    table = 4 * config.rows * config.cols if config.has_table else 0
    return residual * (2 if config.momentum else 1) + table


def collectives_of(name: str, config: Compression) -> int:
    """Of a step of ours; each row of a large table of float32 has one of its own."""
    found = COLLECTIVES[name]
    if not isinstance(config, SketchConfig):
        return found
    if config.candidates == "random" and config.value_bits == 32:
        found += 1  # codes of fewer bits travel with the agreement
    if config.candidates == "heavymix":
        found += looks(config.k)  # histograms
    if config.has_table and config.table_bits == 32 and config.rows * config.cols > CELLS_TOGETHER:
        found += config.rows - 1
    return found
