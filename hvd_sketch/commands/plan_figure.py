"""What a plan predicts, as a figure: seconds of an exchange against bandwidth, and against the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hvd_sketch.commands.styles import STYLES
from hvd_sketch.cost import Method, Network, Workload, methods
from hvd_sketch.files import replaced
from hvd_sketch.units import told_rate

BITS_PER_S = np.logspace(7, 11.6, 47)  # 10 Mbit/s to 400 Gbit/s
RANKS = [2**power for power in range(1, 11)]
SIZE_INCHES, DPI = (11, 5), 120
Seconds = Mapping[str, Sequence[float]]  # by method; NaN where a method has no configuration


def write_figure(path: Path, workload: Workload, network: Network) -> None:
    """Write the figure in the format of the path's suffix; the file is never half there.

    Args:
        workload, network: see :class:`hvd_sketch.commands.plan.Plan`.

    Raises:
        ValueError: matplotlib is not installed, or cannot write this format; ``path`` is a folder.
    """
    if path.is_dir():  # matplotlib would write beside it
        raise ValueError(f"--plot {path}: a folder; expected a file to write")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install hvd_sketch[plot]") from error
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    _check_suffix(path, figure.canvas.get_supported_filetypes())
    by_rate, by_ranks = figure.subplots(1, 2)
    found = {ranks: methods(workload, replace(network, ranks=ranks)) for ranks in RANKS}
    own = methods(workload, network)
    titles = {name: method.title for name, method in own.items()}
    rates = [replace(network, bytes_per_s=rate / 8) for rate in BITS_PER_S]
    _draw(by_rate, BITS_PER_S, {name: [own[name].seconds(there) for there in rates] for name in own}, titles)
    ranks = "ranks" if network.per_host == 1 else f"hosts of {network.per_host} ranks"
    by_rate.set(xlabel="bandwidth of each link, bit/s", title=f"{network.ranks} {ranks}")
    _mark(by_rate, 8 * network.bytes_per_s)
    _draw(by_ranks, RANKS, {name: [_at(found[ranks], name, network, ranks) for ranks in RANKS] for name in own}, titles)
    by_ranks.set(xlabel=ranks, title=told_rate(network.bytes_per_s))
    by_ranks.set_xticks(RANKS, [str(ranks) for ranks in RANKS], minor=False)
    _mark(by_ranks, network.ranks)
    figure.suptitle(
        f"Predicted exchange of {workload.dim:,} coordinates, ours at {workload.ratio:g}x; dotted: as asked"
    )
    figure.legend(*by_ranks.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    try:
        with replaced(path) as draft:
            figure.savefig(draft, dpi=DPI)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: {error}") from error


def _check_suffix(path: Path, known: Collection[str]) -> None:
    """Refuse a file whose suffix names no format. Raises ValueError."""
    if path.suffix[1:].lower() not in known:
        suffixes = ", ".join(f".{name}" for name in sorted(known))
        raise ValueError(f"--plot {path}: expected a file with one of the suffixes {suffixes}")


def _at(found: Mapping[str, Method], name: str, network: Network, ranks: int) -> float:
    return found[name].seconds(replace(network, ranks=ranks)) if name in found else math.nan


def _draw(axes: Any, x: Any, seconds: Seconds, titles: Mapping[str, str]) -> None:
    for name, values in seconds.items():
        every = max(len(values) // 10, 1)
        axes.plot(x, values, label=titles[name], markevery=every, markersize=5, **STYLES[name].options())
    axes.set(xscale="log", yscale="log", ylabel="seconds of an exchange")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _mark(axes: Any, value: float) -> None:
    """Where the plan is."""
    axes.axvline(value, color="grey", linestyle=":", linewidth=1, zorder=0)
