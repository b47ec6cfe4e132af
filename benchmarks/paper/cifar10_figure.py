"""The CIFAR-10 experiment's figure: accuracy against compression, and what grows with the workers; and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    Floats,
    Record,
    draw_bars,
    final,
    grouped,
    markdown,
    mean_of,
    new_figure,
    save_figure,
    styles_of,
    told,
)

NAMES = {"dense": "dense", "true_topk": "true top-k", "sketched": "sketched", "local_topk": "local top-k"}
LINES = styles_of({"dense": "dense", "local_topk": "topk", "true_topk": "topk", "sketched": "paper"})
HEAD = (
    "method | setting | workers | test accuracy | updated per step | wire bytes per step | ratio | "
    "the paper's ratio | seeds"
)


Groups = list[list[Record]]  # of runs that differ in their seed alone


def draw(runs: list[Record], path: Path) -> str:
    """Write the figure; returns the tables as Markdown."""
    accuracy, sweep = (_groups(run for run in runs if run["part"] == part) for part in ("accuracy", "workers"))
    figure = new_figure(13, 3.8)
    axes = figure.subplots(1, 3)
    _draw_accuracy(axes[0], accuracy)
    _draw_growth(axes[1], sweep, "updated_per_step", "updated parameters per step")
    _draw_growth(axes[2], sweep, "wire_bytes_per_step", "bytes per worker and step")
    save_figure(figure, path, dpi=90)
    return "\n\n".join(markdown(HEAD, map(_row, groups)) for groups in (accuracy, sweep) if groups)


def _groups(runs: Iterable[Record]) -> Groups:
    return list(grouped(runs, "method", "setting", "workers", "steps").values())


def _methods(groups: Groups, key: Callable[[list[Record]], float]) -> Iterator[tuple[str, Groups]]:
    """Each method and its groups, ascending by ``key``."""
    for method in dict.fromkeys(group[0]["method"] for group in groups):
        yield method, sorted((group for group in groups if group[0]["method"] == method), key=key)


def _compression(group: list[Record]) -> float:
    """As the paper counts."""
    return mean_of(group, "paper_compression_ratio") or 0.0


def _workers(group: list[Record]) -> int:
    return group[0]["workers"]


def _accuracies(group: list[Record]) -> Floats:
    """In per cent."""
    return 100 * final(group, "test_accuracy")


def _draw_accuracy(ax: Any, groups: Groups) -> None:
    for method, own in _methods(groups, _compression):
        style = {**LINES[method], "label": NAMES[method], "linewidth": 1}
        if method != "true_topk":
            style["linestyle"] = "none"  # its settings differ in more than the compression
        draw_bars(ax, list(map(_compression, own)), list(map(_accuracies, own)), **style)
    ax.set(xscale="log", xlabel="compression, as the paper counts", ylabel="test accuracy (%)")
    _finish(ax, [round(_compression(group)) for group in groups])


def _draw_growth(ax: Any, groups: Groups, figure: str, label: str) -> None:
    for method, own in _methods(groups, _workers):
        values = [mean_of(group, figure) for group in own]
        ax.plot(list(map(_workers, own)), values, label=NAMES[method], linewidth=1, **LINES[method])
    ax.set(xscale="log", yscale="log", xlabel="workers", ylabel=label)
    ax.yaxis.set_minor_formatter("")
    _finish(ax, list(map(_workers, groups)))


def _finish(ax: Any, ticks: list[int]) -> None:
    """Label the places where there is something to see, not those of the logarithmic axis."""
    ax.set_xticks(ticks := sorted(set(ticks)), [str(tick) for tick in ticks])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    ax.grid(alpha=0.3)
    if ax.has_data():
        ax.legend(fontsize=8)


def _row(group: list[Record]) -> Sequence[str]:
    """Of one method, setting and number of workers: means over seeds."""
    found = _accuracies(group)
    return [
        *(NAMES[group[0]["method"]], group[0]["setting"], str(_workers(group))),
        f"{found.mean():.1f} % ({found.min():.1f}–{found.max():.1f})",
        *(told(mean_of(group, name), ",.0f") for name in ("updated_per_step", "wire_bytes_per_step")),
        *(told(mean_of(group, name), ".2f", "×") for name in ("compression_ratio", "paper_compression_ratio")),
        str(len(group)),
    ]
