"""What bandwidth.py shows: tables in Markdown, time against bandwidth, and up to which bandwidth compression pays.

The time of an exchange is what its rank computes plus bytes over bandwidth: a straight line in 1 / bandwidth, where an
unlimited network is the point 0. So between measured points the times are interpolated along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.figures import Record, grouped, markdown, new_figure, save_figure
from benchmarks.network.lab import bits_per_s

LABELS = {
    "dense": "dense, reduce_scatter + allgather",
    "allreduce": "dense, the library's allreduce",
    "fp16": "fp16",
    "topk": "local top-k, as many as at 20×",
    "powersgd": "PowerSGD, rank 4",
    "sketch20": "sketched 20×",
    "sketch100": "sketched 100×",
    "nominate150": "nominated, 4 bits, 150×",
    "lowrank150": "low rank, 4 bits, 150×",
}
OURS = ("sketch20", "sketch100", "nominate150", "lowrank150")
DENSE = ("dense", "allreduce")
Curve = dict[float, float]  # bit/s: seconds
World = tuple[str, int, int]
WORLD = ("transport", "dim", "hosts")  # records of one can be compared with each other


def tables(records: Sequence[Record]) -> str:
    return "\n\n".join(_table(world, group) for world, group in sorted(grouped(records, *WORLD).items()))


def _table(world: World, records: list[Record]) -> str:
    transport, dim, hosts = world
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    about = (
        f"{transport}, {hosts} hosts, dim {dim:,}: median seconds per exchange (compute + network, nothing overlapped)"
    )
    head = f" | {' | '.join(rates)} | MB sent per host | ledger | faster than dense"
    by_method = {name: [record for record in records if record["method"] == name] for name in LABELS}
    dense = fastest(curve(by_method[name]) for name in DENSE)
    rows = []
    for name, of in by_method.items():
        if of:
            splits = {r["rate"]: f"({r['compute_s']:.3f} + {r['network_s']:.3f})" for r in of}
            cells = {r["rate"]: f"**{r['seconds']['median']:.3f}** {splits[r['rate']]}" for r in of}
            pays = name_bandwidth(break_even(curve(of), dense)) if name not in DENSE and dense else ""
            sent = of[0]["interface"]["mean_bytes"], of[0]["ledger_wire_bytes"]
            megabytes = [f"{each / 1e6:.2f}" for each in sent]
            rows.append([LABELS[name], *(cells.get(rate, "") for rate in rates), *megabytes, pays])
    told = "median seconds per exchange (compute + network, nothing overlapped)"
    return f"{about}: {told}\n\n{markdown(head, rows)}"


def plot(records: Sequence[Record], path: Path) -> None:
    """A panel for each world, a row for each network; dotted: ours and the faster dense exchange take the same time."""
    groups = grouped(records, *WORLD)
    networks = sorted({(transport, hosts) for transport, _, hosts in groups})
    dims = sorted({dim for _, dim, _ in groups})
    figure = new_figure(4.4 * len(dims), 0.4 + 3.3 * len(networks))
    axes = figure.subplots(len(networks), len(dims), squeeze=False)
    for row, (transport, hosts) in zip(axes, networks, strict=True):
        for panel, dim in zip(row, dims, strict=True):
            world = (transport, dim, hosts)
            panel.set_visible(world in groups)
            if world in groups:
                _draw(panel, world, groups[world])
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=4, fontsize="small")
    save_figure(figure, path, dpi=90)


def _draw(panel: Any, world: World, records: list[Record]) -> None:
    transport, dim, hosts = world
    finite = [bits_per_s(record["rate"]) for record in records if bits_per_s(record["rate"]) < float("inf")]
    unlimited = 4 * max(finite, default=1e9)  # where the points of the unshaped network are drawn
    curves = {name: curve(r for r in records if r["method"] == name) for name in LABELS}
    for number, (name, points) in enumerate(curves.items()):
        if points:
            x = [min(bandwidth, unlimited) for bandwidth in sorted(points)]
            panel.plot(x, [points[b] for b in sorted(points)], f"C{number}.-", label=LABELS[name])
    dense = fastest(curves[name] for name in DENSE)
    for name in OURS:
        even = break_even(curves[name], dense)
        if 0 < even < float("inf"):
            panel.axvline(min(even, unlimited), linestyle=":", color="grey")
            where = {"transform": panel.get_xaxis_transform(), "rotation": 90, "ha": "right", "fontsize": "x-small"}
            panel.text(min(even, unlimited), 0.02, f"{name}: {name_bandwidth(even)}", **where)
    panel.set(xscale="log", yscale="log", xlabel="bit/s (rightmost: not shaped)", ylabel="seconds per exchange")
    panel.set_title(f"{transport}, {hosts} hosts, dim {dim:,}")
    panel.grid(alpha=0.3)


def curve(records: Iterable[Record]) -> Curve:
    """Median seconds at each bandwidth."""
    return {bits_per_s(record["rate"]): record["seconds"]["median"] for record in records}


def fastest(curves: Iterable[Curve]) -> Curve:
    """The least of several at each bandwidth that any of them has."""
    least: Curve = {}
    for each in curves:
        for bandwidth, seconds in each.items():
            least[bandwidth] = min(seconds, least.get(bandwidth, seconds))
    return least


def break_even(ours: Curve, theirs: Curve) -> float:
    """The bandwidth in bit/s below which ours takes less time.

    Infinite where ours is faster at every bandwidth both were measured at, 0 where at none: then the break-even lies
    outside of what was measured, if there is one. Of several crossings the one at the lowest bandwidth.
    """
    shared = sorted(ours.keys() & theirs.keys())
    gains = [(1 / bandwidth, theirs[bandwidth] - ours[bandwidth]) for bandwidth in shared]
    if not gains or gains[0][1] <= 0:
        return 0.0
    for (slower, gain), (faster, next_gain) in pairwise(gains):
        if next_gain <= 0:
            at = faster + (slower - faster) * -next_gain / (gain - next_gain)
            return 1 / at if at else float("inf")
    return float("inf")


def name_bandwidth(bandwidth: float) -> str:
    """As people say it: "630 Mbit/s"."""
    if bandwidth in (0.0, float("inf")):
        return "at no rate measured" if bandwidth == 0.0 else "at every rate measured"
    digits = f"{bandwidth:.2g}"
    value = float(digits)
    return f"below {value / 1e9:g} Gbit/s" if value >= 1e9 else f"below {value / 1e6:g} Mbit/s"
