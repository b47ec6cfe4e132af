"""Figures of what bandwidth.py has measured, for each model size: time against bandwidth, and against the hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Record, grouped, new_figure, save_figure
from benchmarks.network.bandwidth_report import (
    DENSE,
    LABELS,
    LINES,
    OURS,
    TRANSPORTS,
    break_even,
    curve,
    fastest,
    name_bandwidth,
    told_bandwidth,
)
from benchmarks.network.lab import UNSHAPED, bits_per_s

FEWEST_HOSTS = 3  # numbers of hosts that make a figure
LINES_END = 0.74  # of a panel's height: above it stands text
Panels = Mapping[tuple[Any, ...], list[Record]]  # by transport, and what else tells the panels of a row apart


def plot(records: Sequence[Record], path: Path) -> list[Path]:
    """Figures for each model size, beside ``path``; panels by transport, and by number of hosts or by rate.

    Returns:
        The files: for several sizes ``bandwidth-25M.png``, ``bandwidth-25M-hosts.png`` and the like, for one ``path``
        and ``bandwidth-hosts.png``. Those of the hosts where three numbers of them were measured.
    """
    sizes = sorted(grouped(records, "dim").items())
    paths = []
    for (dim,), own in sizes:
        name = f"{dim / 1e6:g}M" if dim >= 10_000 else str(dim)
        paths.append(path.with_stem(f"{path.stem}-{name}") if len(sizes) > 1 else path)
        _plot_bandwidths(dim, grouped(own, "transport", "hosts"), paths[-1])
        if len(grouped(own, "hosts")) >= FEWEST_HOSTS:
            paths.append(paths[-1].with_stem(f"{paths[-1].stem}-hosts"))
            _plot_hosts(dim, grouped(own, "transport", "rate"), paths[-1])
    return paths


def _plot_bandwidths(dim: int, panels: Panels, path: Path) -> None:
    hosts = sorted({number for _, number in panels})
    columns, x = {number: f"{number} hosts" for number in hosts}, "bandwidth of a host, bit/s; last: no limit"
    figure, axes = _draw_panels(panels, columns, x, _draw_bandwidths)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high * (high / low) ** (1 / LINES_END - 1))
    figure.suptitle(f"{dim:,} coordinates; in the corners: where ours takes less time than dense")
    save_figure(figure, path, dpi=90)


def _plot_hosts(dim: int, panels: Panels, path: Path) -> None:
    from matplotlib.ticker import NullLocator

    rates = sorted({rate for _, rate in panels}, key=bits_per_s)
    columns = {rate: "no limit" if rate == UNSHAPED else told_bandwidth(bits_per_s(rate)) for rate in rates}
    figure, axes = _draw_panels(panels, columns, "hosts", _draw_hosts)
    hosts = sorted({record["hosts"] for records in panels.values() for record in records})
    axes[0, 0].set_xticks(hosts, [str(number) for number in hosts])
    axes[0, 0].xaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"{dim:,} coordinates")
    save_figure(figure, path, dpi=90)


def _draw_panels(
    panels: Panels, columns: Mapping[Any, str], x: str, draw: Callable[[Any, Sequence[Record]], None]
) -> tuple[Any, Any]:
    """A row for each transport, and one legend: the figure and its axes."""
    transports = sorted({transport for transport, _ in panels})
    figure = new_figure(1 + 3.9 * len(columns), 1.2 + 3.4 * len(transports))
    axes = figure.subplots(len(transports), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, transport in zip(axes, transports, strict=True):
        for panel, (column, title) in zip(row, columns.items(), strict=True):
            panel.set_visible((transport, column) in panels)
            draw(panel, panels.get((transport, column), []))
            panel.set_title(f"{TRANSPORTS[transport]}, {title}", fontsize="medium")
            panel.grid(alpha=0.3)
    for column in axes.T:
        lowest = [panel for panel in column if panel.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(x)
    for panel in axes[:, 0]:
        panel.set_ylabel("seconds of an exchange")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize="small")
    return figure, axes


def _draw_bandwidths(panel: Any, records: Sequence[Record]) -> None:
    finite = [bits_per_s(record["rate"]) for record in records if bits_per_s(record["rate"]) < float("inf")]
    unlimited = 4 * max(finite, default=1e9)  # where the points of the unshaped network are drawn
    curves = {name: curve(r for r in records if r["method"] == name) for name in LABELS}
    for name, points in curves.items():
        if points:
            x = [min(bandwidth, unlimited) for bandwidth in sorted(points)]
            y = [points[bandwidth] for bandwidth in sorted(points)]
            panel.plot(x, y, label=LABELS[name], linewidth=1.2, markersize=5, **LINES[name])
    dense = fastest(curves[name] for name in DENSE)
    measured = [name for name in OURS if curves[name] and dense]
    for line, name in enumerate(measured, start=1):  # one under the other in the corner that the curves leave free
        even, style = break_even(curves[name], dense), {"color": LINES[name]["color"], "fontsize": "small"}
        is_between = 0 < even <= max(finite, default=0)  # not between the fastest rate and no limit
        told = name_bandwidth(even) if is_between or even in (0, float("inf")) else "at every limited rate"
        text, place = f"{LABELS[name]}: {told}", (-4, 8 - 12 * line)
        if is_between:  # a number tells which dotted line is this one's
            text, end = f"({line}) {text}", LINES_END - 0.06 * (line - 1)  # two numbers side by side would collide
            panel.axvline(even, ymax=end, linestyle=":", linewidth=1, color=style["color"])
            panel.text(even, end, f"({line})", transform=panel.get_xaxis_transform(), ha="center", **style)
        panel.annotate(text, (1, 1), place, "axes fraction", "offset points", ha="right", va="top", **style)
    panel.set(xscale="log", yscale="log")


def _draw_hosts(panel: Any, records: Sequence[Record]) -> None:
    for name, label in LABELS.items():
        own = sorted((r for r in records if r["method"] == name), key=lambda record: record["hosts"])
        if own:
            seconds = [record["seconds"]["median"] for record in own]
            panel.plot([r["hosts"] for r in own], seconds, label=label, linewidth=1.2, markersize=5, **LINES[name])
    panel.set(xscale="log", yscale="log")
