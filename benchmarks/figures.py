"""What the figures and tables of all benchmarks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sketch.commands.styles import STYLES, Style
from hvd_sketch.files import replaced

OF_OTHERS = Style("#8C564B", "--", "d")
LATER_MARKERS = "^sv<>DPX*h"
Record = dict[str, Any]
Floats = npt.NDArray[np.float64]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib to a file, in the format of its suffix; the file is never half there."""
    with replaced(path) as draft:
        figure.savefig(draft, dpi=dpi)


def plain_logarithmic(axis: Any, unit: float = 1.0) -> None:
    """Marks at 1, 2, 5, 10, … of a unit on a logarithmic axis, in plain figures."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value / unit:g}")
    axis.set_minor_formatter(NullFormatter())


def shared_legend(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """One legend below all axes of a figure, each label once."""
    drawn = {label: mark for ax in axes for mark, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def styles_of(kinds: Mapping[str, str]) -> dict[str, Record]:
    """Options of ``axes.plot`` for every method of a figure, from :data:`hvd_sketch.commands.styles.STYLES`.

    Args:
        kinds: by method, its key in STYLES, or anything else for methods of others. Of several methods of one kind the
            later ones have hollow markers, from the third on other ones.
    """
    seen: Counter[Style] = Counter()
    styles: dict[str, Record] = {}
    for method, kind in kinds.items():
        style = STYLES.get(kind, OF_OTHERS)
        own, place = style.options(), seen[style]
        if place:
            own |= {"markerfacecolor": "white", "linestyle": ":"}
        if place > 1:
            others = LATER_MARKERS.replace(own["marker"], "")
            own["marker"] = others[(place - 2) % len(others)]
        styles[method] = own
        seen[style] += 1
    return styles


def markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the head's cells are separated by ``|``."""
    cells = [head.split("|"), ["---"] * (head.count("|") + 1), *rows]
    lines = ("|".join(f" {cell.strip()} " if cell.strip() else " " for cell in line) for line in cells)
    return "\n".join(f"|{line}|" for line in lines).replace(" --- ", "---")


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by their values of ``names``, in the order of the first of each group."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def longest(runs: Iterable[Record]) -> list[Record]:
    """The runs with the most steps."""
    runs = list(runs)
    most = max((run["steps"] for run in runs), default=0)
    return [run for run in runs if run["steps"] == most]


def final(runs: Iterable[Record], metric: str) -> Floats:
    """A metric at each run's end."""
    return np.array([run["final"][metric] for run in runs])


def curves(runs: Iterable[Record], metric: str) -> Floats:
    """A metric at every point of every run: [runs, points]."""
    return np.array([[point[metric] for point in run["curve"]] for run in runs])


def mean_of(runs: Iterable[Record], name: str) -> float | None:
    """Over seeds, of a figure of the run or of its end; None for what exists in a simulation only."""
    values = [run[name] if name in run else run["final"][name] for run in runs]
    return None if None in values else float(np.mean(values))


def steps_of(run: Record) -> Floats:
    """The steps after which a run was measured."""
    return np.array([point["step"] for point in run["curve"]], dtype=np.float64)


def spread(values: Floats, form: str, unit: str = "") -> str:
    """The mean, and the least and the greatest if there are several."""
    mean, least, greatest = (f"{value:{form}}" for value in (values.mean(), values.min(), values.max()))
    return f"{mean}{unit} ({least}–{greatest})" if len(values) > 1 else f"{mean}{unit}"


def told(value: float | None, form: str, unit: str = "") -> str:
    """A dash for what exists in a simulation only."""
    return "–" if value is None else f"{value:{form}}{unit}"


def draw_band(ax: Any, x: Floats, values: Floats, style: str, color: str, label: str) -> None:
    """The mean over seeds, and all between the least and the greatest seed; ``values`` are [seeds, points]."""
    ax.plot(x, values.mean(0), style, color=color, label=label, linewidth=1.2)
    ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def draw_bars(ax: Any, x: Sequence[float] | Floats, values: Sequence[Floats], style: str = "", **options: Any) -> None:
    """At each place the mean over seeds, with a bar from the least to the greatest seed."""
    means, least, greatest = (np.array([f(each) for each in values]) for f in (np.mean, np.min, np.max))
    ax.errorbar(x, means, [means - least, greatest - means], fmt=style, capsize=3, **options)
