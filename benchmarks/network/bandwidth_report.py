"""What bandwidth.py shows of its records: tables in Markdown, and a plot of time against bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Record, grouped, markdown, new_figure
from benchmarks.network.break_even import DENSE, OURS, break_even, curve, fastest, name_bandwidth
from benchmarks.network.lab import bits_per_s

LABELS = {
    "dense": "dense, reduce_scatter + allgather",
    "allreduce": "dense, the library's allreduce",
    "fp16": "fp16",
    "topk": "local top-k, as many as at 20×",
    "powersgd": "PowerSGD, rank 4",
    "sketch20": "sketched 20×",
    "sketch100": "sketched 100×",
}
World = tuple[str, int, int]  # transport, dim, hosts


def worlds(records: Sequence[Record]) -> dict[World, list[Record]]:
    """Records that can be compared with each other."""
    return grouped(records, "transport", "dim", "hosts")


def tables(records: Sequence[Record]) -> str:
    return "\n\n".join(_table(world, group) for world, group in sorted(worlds(records).items()))


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
            cells = {record["rate"]: _cell(record) for record in of}
            pays = name_bandwidth(break_even(curve(of), dense)) if name not in DENSE and dense else ""
            sent = of[0]["interface"]["mean_bytes"], of[0]["ledger_wire_bytes"]
            megabytes = [f"{each / 1e6:.2f}" for each in sent]
            rows.append([LABELS[name], *(cells.get(rate, "") for rate in rates), *megabytes, pays])
    told = "median seconds per exchange (compute + network, nothing overlapped)"
    return f"{about}: {told}\n\n{markdown(head, rows)}"


def _cell(record: Record) -> str:
    return f"**{record['seconds']['median']:.3f}** ({record['compute_s']:.3f} + {record['network_s']:.3f})"


def plot(records: Sequence[Record], path: Path) -> None:
    """A panel for each world, a row for each network; dotted: ours and the faster dense exchange take the same time."""
    groups = worlds(records)
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
    figure.savefig(path, dpi=90)


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
