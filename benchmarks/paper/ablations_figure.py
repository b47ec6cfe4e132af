"""The ablations' figure, one panel per group at every setting's best learning rate, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import (
    Floats,
    Record,
    draw_bars,
    final,
    longest,
    markdown,
    mean_of,
    new_figure,
    save_figure,
    spread,
    styles_of,
    told,
)

TARGET_LOSS = {"ablations_mnist": 0.3, "ablations_cifar10": 1.5}  # whose first step the table gives
TITLES = {
    "baselines": "learning rates",
    "hashes": "hashes",
    "rows": "rows, at equal bytes",
    "momentum": "momentum 0.9 and masking",
    "share": "P, |S| + Pk constant",
    "share_of_bytes": "P, at equal bytes",
    "heavymix": "selection, at equal bytes",
    "wire": "tables on the wire",
    "k": "k up to d, momentum before",
}
REFERENCES = ("dense", "dense, momentum", "true top-k")  # lines across the other panels
MOMENTA = ("before, masked", "before, not masked", "after")
KINDS = {"dense": "dense", "dense, momentum": "dense", "true top-k": "topk"}
LINES = styles_of(KINDS | dict.fromkeys(("sketched", *MOMENTA), "paper"))
SHOWN_LOSS = 2.5  # above lies chance: log(10)


@dataclass(frozen=True)
class Point:
    """One setting in one group at its best rate, all seeds."""

    group: str
    label: str
    fields: dict[str, Any]
    best_rate: float
    at_edge: bool
    loss_by_rate: dict[float, float]
    runs: Sequence[Record]

    @property
    def losses(self) -> Floats:
        """[seeds]."""
        return final(self.runs, "train_loss")

    def steps_to(self, loss: float) -> float | None:
        """The first step with a training loss as low, between points on a line, mean over seeds; None: not on all."""
        reached = [step for run in self.runs if (step := _first_below(run["curve"], loss)) is not None]
        return float(np.mean(reached)) if len(reached) == len(self.runs) else None


def _first_below(curve: Sequence[dict[str, float]], loss: float) -> float | None:
    step, before = 0.0, np.inf
    for point in curve:
        if point["train_loss"] <= loss:
            part = (before - loss) / (before - point["train_loss"]) if np.isfinite(before) else 1.0
            return float(step + part * (point["step"] - step))
        step, before = point["step"], point["train_loss"]
    return None


def points(runs: list[Record]) -> list[Point]:
    """Of the longest trainings, in the order in which they were made; what several calls made counts once."""
    last = longest(runs)
    summaries = {(run["group"], run["label"]): run for run in last if "group" in run}.values()
    trained = {(run["setting"], run["rate"], run["seed"]): run for run in last if "curve" in run}.values()

    def of(summary: Record) -> list[Record]:
        wanted = {"setting": summary["setting"], "rate": summary["best_rate"]}
        return [run for run in trained if wanted.items() <= run.items()]

    names = ("group", "label", "fields", "best_rate", "at_edge")
    rates = [{float(rate): loss for rate, loss in s["loss_by_rate"].items()} for s in summaries]
    return [Point(*(s[n] for n in names), by_rate, of(s)) for s, by_rate in zip(summaries, rates, strict=True)]


def draw(runs: list[Record], path: Path) -> str:
    """Write the figure, named after the experiment; returns the table as Markdown."""
    all_points = points(runs)
    groups = [group for group in TITLES if any(p.group == group for p in all_points)]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = new_figure(3.6 * columns, 3.9 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    references = [p for p in all_points if p.group == "baselines" and p.label in REFERENCES]
    for group, ax in zip(groups, axes.flat, strict=False):
        own = [p for p in all_points if p.group == group]
        if group == "baselines":  # the rates of other settings, too, that differ by what is not a size
            _draw_rates(ax, own + [p for p in all_points if p.group == "momentum" and p.label != "none"])
        else:
            (_draw_k if group == "k" else _draw_labels)(ax, own)
            for p in references:
                line = {name: LINES[p.label][name] for name in ("color", "linestyle")}
                ax.axhline(p.losses.mean(), linewidth=1, **line)
        _finish(ax, TITLES[group])
    for row in axes:
        row[0].set_ylabel("training loss at the end")
    save_figure(figure, path, dpi=90)
    target = TARGET_LOSS[path.stem]
    head = (
        f"group | setting | best rate | training loss | test error | steps to a loss of {target:g} | "
        "wire bytes per step | ratio | the paper's ratio | seeds"
    )
    return markdown(head, [_row(point, target) for point in all_points])


def _finish(ax: Any, title: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set(title=title, yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, axis="y")


def _draw_labels(ax: Any, own: Sequence[Point]) -> None:
    """Means over seeds, and bars from the least to the greatest."""
    _draw_losses(ax, np.arange(len(own)), own, **LINES["sketched"] | {"linestyle": "none"})
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(len(p.label) for p in own) > 4 else {}
    ax.set_xticks(range(len(own)), [p.label for p in own], fontsize=7, **turned)


def _draw_k(ax: Any, own: Sequence[Point]) -> None:
    for masking, name in ((True, "masked"), (False, "not masked")):
        part = [p for p in own if p.fields["masking"] is masking]
        ks = np.array([p.fields["k"] for p in part], dtype=np.float64)
        _draw_losses(ax, ks, part, label=name, **LINES[f"before, {name}"])
    ax.set(xscale="log", xlabel="k; the last is d")
    ax.legend(fontsize=6.5)


def _draw_losses(ax: Any, at: Floats, own: Sequence[Point], **options: Any) -> None:
    draw_bars(ax, at, [p.losses for p in own], markersize=5, linewidth=1.2, **options)


def _draw_rates(ax: Any, own: Sequence[Point]) -> None:
    """Loss over learning rate; what diverged is left out."""
    for p in own:
        rates = sorted(rate for rate, loss in p.loss_by_rate.items() if loss < SHOWN_LOSS)
        name = p.label if p.group == "baselines" else f"sketched, momentum {p.label}"
        style = {**LINES[p.label], "markersize": 4, "linewidth": 1.2}
        ax.plot(rates, [p.loss_by_rate[r] for r in rates], label=name, **style)
    ax.set(xscale="log", xlabel="learning rate at its peak")
    ax.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def _row(point: Point, target_loss: float) -> Sequence[str]:
    """Means over seeds, in brackets the least and the greatest."""
    steps = point.steps_to(target_loss)
    return [
        *(point.group, point.label, f"{point.best_rate:g}" + " (at the edge)" * point.at_edge),
        *(spread(point.losses, ".3f"), spread(100 * final(point.runs, "test_error"), ".2f", " %")),
        "not reached" if steps is None else f"{steps:.0f}",
        told(mean_of(point.runs, "wire_bytes_per_step"), ",.0f"),
        *(told(mean_of(point.runs, name), ".1f", "×") for name in ("compression_ratio", "paper_compression_ratio")),
        str(len(point.runs)),
    ]
