"""The figure of what changes with the number of ranks: the result, and the bytes of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.records import Group, Record, mean, results_of
from benchmarks.figures import (
    draw_bars,
    grouped,
    new_figure,
    plain_logarithmic,
    save_figure,
    shared_legend,
    styles_of,
)

KINDS = ("lowrank", "nominate", "sketch", "random", "dense16", "dense", "local", "truetopk", "paper", "powersgd")
TOPK = ("local", "truetopk")


def kind_of(method: str) -> str:
    """Whose colour a method has in figures; its own name where it is none of ours or of our rivals."""
    kind = next((kind for kind in KINDS if method.startswith(kind)), method)
    return "topk" if kind in TOPK else "bf16" if kind == "dense16" else kind


LINES = styles_of({name: kind_of(name) for name in METHODS})
FEWEST = 3  # numbers of ranks that make a figure


def draw_by_ranks(best: Mapping[Group, list[Record]], measure: str, path: Path) -> bool:
    """Draw the methods of one task that were trained with several numbers of ranks, one of them with :data:`FEWEST`.

    Args:
        best: the runs at the best rate, of all groups of the task.
        measure: what the results are.
        path: of the figure.

    Returns:
        Whether there is such a method. Otherwise nothing is drawn.
    """
    entries = [
        {"place": (g.method, g.ratio, g.steps, g.skewed), "group": g} for g in best if not METHODS[g.method].fixed_ratio
    ]
    lines = [[e["group"] for e in own] for own in grouped(entries, "place").values() if len(own) > 1]
    if max(map(len, lines), default=0) < FEWEST:
        return False
    several = len({(own[0].ratio, own[0].steps, own[0].skewed) for own in lines}) > 1
    figure = new_figure(10, 4.2)
    axes = figure.subplots(1, 2)
    for groups in lines:
        groups.sort(key=lambda group: group.workers)
        of = groups[0]
        where = f", {of.ratio:g}×, {of.steps} steps{', skewed' * of.skewed}" if several else ""
        style = {**LINES[of.method], "label": METHODS[of.method].title + where, "linewidth": 1, "markersize": 6}
        ranks = [group.workers for group in groups]
        draw_bars(axes[0], ranks, [results_of(best[group]) for group in groups], **style)
        axes[1].plot(ranks, [(mean(best[g], "wire_bytes_per_step") or 0) / 1000 for g in groups], **style)
    axes[0].set_ylabel(measure)
    axes[1].set(ylabel="kB per step and rank, sent and received", yscale="log")
    ranks = sorted({group.workers for groups in lines for group in groups})
    for ax in axes:
        _mark_ranks(ax, ranks)
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low / 2, high * 2)  # at one ratio all methods have nearly the same bytes
    plain_logarithmic(axes[1].yaxis)
    shared_legend(figure, axes[:1], columns=2)
    save_figure(figure, path, dpi=90)
    return True


def _mark_ranks(ax: Any, ranks: list[int]) -> None:
    from matplotlib.ticker import NullFormatter

    ax.set(xscale="log", xlabel="ranks")
    ax.set_xticks(ranks, list(map(str, ranks)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
