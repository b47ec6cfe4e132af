"""The CIFAR-10 experiment's figure: accuracy against compression, and what grows with the workers; and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Floats, Record, draw_bars, final, grouped, markdown, new_figure, told

NAMES = {"dense": "dense", "true_topk": "true top-k", "sketched": "sketched", "local_topk": "local top-k"}
COLOURS = {"dense": "black", "true_topk": "tab:green", "sketched": "tab:orange", "local_topk": "tab:blue"}
HEAD = (
    "method | setting | workers | test accuracy | updated per step | wire bytes per step | ratio | "
    "the paper's ratio | seeds"
)


class Seeds:
    """The runs that differ in their seed alone."""

    def __init__(self, runs: list[Record]) -> None:
        self.runs = runs
        self.method, self.setting, self.workers = (runs[0][name] for name in ("method", "setting", "workers"))

    def mean(self, figure: str) -> float | None:
        """None where the method has no such figure."""
        found = [run[figure] if figure in run else run["final"][figure] for run in self.runs]
        return None if None in found else float(np.mean(found))

    @property
    def compression(self) -> float:
        """As the paper counts."""
        return self.mean("paper_compression_ratio") or 0.0

    @property
    def accuracies(self) -> Floats:
        """In per cent."""
        return 100 * final(self.runs, "test_accuracy")


def draw(runs: list[Record], path: Path) -> str:
    """Write the figure; returns the tables as Markdown."""
    groups = {name: list(map(Seeds, _by_seeds(runs, name))) for name in ("accuracy", "workers")}
    figure = new_figure(13, 3.8)
    axes = figure.subplots(1, 3)
    _draw_accuracy(axes[0], groups["accuracy"])
    _draw_growth(axes[1], groups["workers"], "updated_per_step", "updated parameters per step")
    _draw_growth(axes[2], groups["workers"], "wire_bytes_per_step", "bytes per worker and step")
    figure.savefig(path, dpi=90)
    return "\n\n".join(markdown(HEAD, map(_row, group)) for group in groups.values() if group)


def _by_seeds(runs: list[Record], part: str) -> list[list[Record]]:
    chosen = (run for run in runs if run["part"] == part)
    return list(grouped(chosen, "method", "setting", "workers", "steps").values())


def _methods(groups: list[Seeds]) -> dict[str, list[Seeds]]:
    return {
        method: [group for group in groups if group.method == method]
        for method in dict.fromkeys(g.method for g in groups)
    }


def _draw_accuracy(ax: Any, groups: list[Seeds]) -> None:
    for method, own in _methods(groups).items():
        own.sort(key=lambda group: group.compression)
        style = {"color": COLOURS[method], "label": NAMES[method], "linewidth": 1}
        ratios, accuracies = [group.compression for group in own], [group.accuracies for group in own]
        draw_bars(ax, ratios, accuracies, "o-" if method == "true_topk" else "o", **style)
    ax.set(xscale="log", xlabel="compression, as the paper counts", ylabel="test accuracy (%)")
    _finish(ax, [round(group.compression) for group in groups])


def _draw_growth(ax: Any, groups: list[Seeds], figure: str, label: str) -> None:
    for method, own in _methods(groups).items():
        own.sort(key=lambda group: group.workers)
        workers, values = [group.workers for group in own], [group.mean(figure) for group in own]
        ax.plot(workers, values, "o-", color=COLOURS[method], label=NAMES[method], linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="workers", ylabel=label)
    ax.yaxis.set_minor_formatter("")
    _finish(ax, [group.workers for group in groups])


def _finish(ax: Any, ticks: list[int]) -> None:
    """Label the places where there is something to see, not those of the logarithmic axis."""
    ax.set_xticks(ticks := sorted(set(ticks)), [str(tick) for tick in ticks])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    ax.grid(alpha=0.3)
    if ax.has_data():
        ax.legend(fontsize=8)


def _row(group: Seeds) -> Sequence[str]:
    """Of one method, setting and number of workers: means over seeds."""
    found = group.accuracies
    return [
        *(NAMES[group.method], group.setting, str(group.workers)),
        f"{found.mean():.1f} % ({found.min():.1f}–{found.max():.1f})",
        *(told(group.mean(name), ",.0f") for name in ("updated_per_step", "wire_bytes_per_step")),
        *(told(group.mean(name), ".2f", "×") for name in ("compression_ratio", "paper_compression_ratio")),
        str(len(group.runs)),
    ]
