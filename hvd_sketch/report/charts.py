"""The charts of a report, as Plotly's own JSON: data and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_sketch.report.decimate import ends, peaks, sums
from hvd_sketch.report.runs import Numbers, Run, Series
from hvd_sketch.units import told_bytes, told_seconds

# Told apart on white and on black, and by those who see colours differently (Okabe and Ito).
COLORS = ("#0a84d6", "#e08a00", "#00a37a", "#d4569a", "#8c7ae6", "#d9534f", "#5aa9c9", "#9a8c2e", "#7f8c8d")
FAINT, SMOOTHED = 0.35, 50  # of single points; a curve is their mean over a 50th of a run
FEW_DECADES = 2
SEVERAL = 20.0  # times as large: then an axis has a logarithmic scale
BYTES = {"tickformat": "~s", "ticksuffix": "B"}
SECONDS = {"tickformat": "~s", "ticksuffix": "s"}
STEP = {"title": {"text": "step"}}
Colored = tuple[Run, str]
SENT = {"title": {"text": "bytes sent by a rank"}}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: above it.
        about: a sentence or two below the title.
        data, layout: Plotly's.
    """

    title: str
    about: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts of some runs: those that compare them first, then one for each."""
    colored = [(run, COLORS[number % len(COLORS)]) for number, run in enumerate(runs)]
    found = [cumulative_bytes(colored)]
    for name in dict.fromkeys(name for run in runs for name in run.values):
        with_it = [(run, color) for run, color in colored if name in run.values and len(run.values[name].at)]
        if with_it:
            found += [over_bytes(name, with_it), over_time(name, with_it)]
    found += [longest_steps(colored), skipped_steps(colored)]
    measured = [(run, color) for run, color in colored if len(run.residual_norm.at)]
    if measured:
        found += [residual(measured), captured(measured)]
    suffixes = {run.name: f": {run.name}" if len(runs) > 1 else "" for run in runs}
    of_one = bytes_by_phase, time_of_step, time_of_ranks
    return found + [chart(run, suffixes[run.name]) for chart in of_one for run in runs]


def cumulative_bytes(runs: Sequence[Colored]) -> Chart:
    """Against a dense exchange."""
    data = []
    for run, color in runs:
        for name, sent, dash in (
            (run.name, run.sent_so_far, "solid"),
            (f"{run.name}: dense in its place", np.cumsum(run.dense_bytes), "dot"),
        ):
            at = peaks(sent)
            data.append(_line(name, run.step[at] + 1, sent[at], color, dash=dash))
    return Chart(
        "Bytes sent and received",
        "By a rank, up to each step, where collectives are rings: it receives as many as it sends. Logarithmic.",
        data,
        {"xaxis": STEP, "yaxis": _logarithmic(_all_of("y", data), told_bytes)},
    )


def over_bytes(name: str, runs: Sequence[Colored]) -> Chart:
    """A number that was logged, over the bytes that it took."""
    is_wide = _spread([run.sent_so_far[-1] for run, _ in runs]) > SEVERAL
    data = _curves(runs, lambda run: run.values[name], lambda run: run.sent_so_far)
    scale = _logarithmic(_all_of("x", data), told_bytes) if is_wide else BYTES
    return Chart(f"{name} over bytes", "", data, {"xaxis": {**SENT, **scale}})


def over_time(name: str, runs: Sequence[Colored]) -> Chart:
    """A number that was logged, over the time that it took."""
    data = _curves(runs, lambda run: run.values[name], lambda run: run.time_s)
    return Chart(f"{name} over time", "", data, {"xaxis": {"title": {"text": "time of training"}, **SECONDS}})


def bytes_by_phase(run: Run, suffix: str) -> Chart:
    """Of a step: means over some steps, and the most of any line among them."""
    total = sum(run.sent_bytes.values(), np.zeros(len(run.step)))
    data = _stack(run, run.sent_bytes)
    at = peaks(total / run.steps)
    single = _line("single steps", run.step[at], (total / run.steps)[at], COLORS[-1], width=1, dash="dot")
    return Chart(
        f"Bytes of a step, by phase{suffix}",
        "Sent by a rank, which receives as many. Areas are means over some steps; the dotted line has all peaks.",
        [*data, single],
        {"xaxis": STEP, "yaxis": {**BYTES, "rangemode": "tozero"}},
    )


def time_of_step(run: Run, suffix: str) -> Chart:
    """What a step's time goes into: means over ranks and over some steps."""
    data = _stack(run, {name: np.nanmean(seconds, 0) for name, seconds in run.parts_s.items()})
    return Chart(
        f"Time of a step{suffix}", _about_time(run), data, {"xaxis": STEP, "yaxis": {**SECONDS, "rangemode": "tozero"}}
    )


def time_of_ranks(run: Run, suffix: str) -> Chart:
    """What a step's time goes into, on each rank."""
    names = [f"rank {rank}" for rank in run.ranks]
    steps = (np.isfinite(run.step_s) * run.steps).sum(1)  # [r], of which each has a line
    data = [
        {"type": "bar", "orientation": "h", "name": name, "y": names, "x": _short(np.nansum(seconds, 1) / steps)}
        | {"marker": {"color": color}}
        for (name, seconds), color in zip(run.parts_s.items(), COLORS, strict=False)
    ]
    layout = {"barmode": "stack", "xaxis": SECONDS, "yaxis": {"autorange": "reversed"}}
    about = "Means over all steps. The rank that waits least is the one that the others wait for."
    return Chart(f"Time of a step, by rank{suffix}", about, data, layout)


def longest_steps(runs: Sequence[Colored]) -> Chart:
    """Single steps that took long."""
    data = []
    for run, color in runs:
        at = peaks(run.longest_s)
        data.append(_line(run.name, run.step[at], run.longest_s[at], color, width=1))
    return Chart(
        "Longest and shortest steps",
        "Of the slowest rank. All peaks are there. Logarithmic.",
        data,
        {"xaxis": STEP, "yaxis": _logarithmic(_all_of("y", data), told_seconds)},
    )


def skipped_steps(runs: Sequence[Colored]) -> Chart:
    """How many steps all ranks skipped so far."""
    data = []
    for run, color in runs:
        skipped = np.cumsum(run.skipped)
        at = peaks(skipped)
        data.append(_line(f"{run.name}: {skipped[-1]:.0f}", run.step[at], skipped[at], color, shape="hv"))
    return Chart(
        "Skipped steps",
        "Up to each step, because the gradient of some rank was not finite.",
        data,
        {"xaxis": STEP, "yaxis": {"rangemode": "tozero"}, "showlegend": True},
    )


def residual(runs: Sequence[Colored]) -> Chart:
    """What is produced and not sent."""
    data = _curves(runs, lambda run: run.residual_norm, lambda run: run.step)
    about = "What a rank has produced and not sent yet: mean over ranks, every 50th step. If it never falls, send more."
    return Chart("Norm of the residual", about, data, {"xaxis": STEP, "yaxis": {"rangemode": "tozero"}})


def captured(runs: Sequence[Colored]) -> Chart:
    """The share of the residual that a step sends."""
    data = _curves(runs, lambda run: run.captured, lambda run: run.step)
    about = "The share of the residual's sum of squares that a step takes off it: mean over ranks, every 50th step."
    return Chart("Captured energy", about, data, {"xaxis": STEP, "yaxis": {"tickformat": ".2~%"}})


def _about_time(run: Run) -> str:
    if run.has_all_ranks:
        return "Means over ranks and some steps. The rank that comes last to a collective waits for nobody."
    found = f"{run.found} of {run.about['size']} ranks"
    return f"The logs of {found} were found: without the others, the network cannot be told from waiting."


def _spread(values: Sequence[float]) -> float:
    positive = [value for value in values if value > 0]
    return max(positive) / min(positive) if positive else 1.0


def _curves(
    runs: Sequence[Colored], series_of: Callable[[Run], Series], x_of: Callable[[Run], Numbers]
) -> list[dict[str, Any]]:
    """Single points, faint where there are many, and then their running mean."""
    data = []
    for run, color in runs:
        series = series_of(run)
        x, y = x_of(run)[series.at], series.values
        at = peaks(y)
        is_long = len(y) > 2 * SMOOTHED
        points = _line(run.name, x[at], y[at], color, width=1 if is_long else 2)
        if not is_long:
            data.append(points | {"mode": "lines+markers" if len(y) < SMOOTHED else "lines"})
            continue
        data.append(points | {"opacity": FAINT, "showlegend": False})
        mean = running_mean(y, len(y) // SMOOTHED)
        at = peaks(mean)
        data.append(_line(run.name, x[at], mean[at], color))
    return data


def running_mean(y: Numbers, width: int) -> Numbers:
    """The mean of the last ``width`` numbers at each of them, [n]; of the last tenth of a series where that is less."""
    ends = np.arange(1, len(y) + 1)
    widths = np.clip(ends // 10, 1, max(width, 1))
    # Each window by itself: a difference of sums from the start is wrong for good after one very large number.
    bounds = np.stack([ends - widths, ends], axis=1).ravel()
    most = widths.max()  # by which all are divided first: a sum of large numbers is not finite
    return np.add.reduceat(np.append(y / most, 0.0), bounds)[::2] * (most / widths)


def _logarithmic(values: NDArray[Any], told: Callable[[float], str]) -> dict[str, Any]:
    """An axis with the powers of ten that some values span, in words; with few of them also twice and five times."""
    positive = values[values > 0]
    low, high = (np.log10(positive.min()), np.log10(positive.max())) if len(positive) else (0.0, 0.0)
    steps = (1, 2, 5) if high - low < FEW_DECADES else (1,)
    ticks = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [told(tick).replace(".00", "").replace(".0 ", " ") for tick in ticks],
    }


def _all_of(axis: str, data: list[dict[str, Any]]) -> NDArray[Any]:
    return np.concatenate([np.asarray(trace[axis]) for trace in data])


def _stack(run: Run, parts: Any) -> list[dict[str, Any]]:
    """Areas upon each other, per step: [n] by name, sums over the steps of a line."""
    steps, x = sums(run.steps), run.step[ends(len(run.step))]
    return [
        _line(name, x, sums(part) / steps, color, width=0) | {"stackgroup": "all", "fillcolor": color}
        for (name, part), color in zip(parts.items(), COLORS * (1 + len(parts) // len(COLORS)), strict=False)
    ]


def _line(name: str, x: NDArray[Any], y: NDArray[Any], color: str, **line: Any) -> dict[str, Any]:
    drawn = {"type": "scatter", "mode": "lines", "name": name, "x": _short(x), "y": _short(y)}
    return drawn | {"line": {"color": color, "width": 2, **line}}


def _short(values: NDArray[Any]) -> list[float]:
    """Five digits: more cannot be seen, and make the page larger."""
    return [float(f"{value:.5g}") for value in values.tolist()]
