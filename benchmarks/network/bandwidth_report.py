"""What bandwidth.py shows: tables in Markdown, time against bandwidth, and up to which bandwidth compression pays.

The time of an exchange is what its rank computes plus bytes over bandwidth: a straight line in 1 / bandwidth, where an
unlimited network is the point 0. So between measured points the times are interpolated along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.figures import Record, grouped, markdown, new_figure, save_figure, styles_of
from benchmarks.network.lab import UNSHAPED, bits_per_s

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
    "recommended": "`recommended`, 150×",
}
KINDS = {
    "allreduce": "dense",
    "dense": "dense",
    "fp16": "bf16",
    "topk": "topk",
    "powersgd": "powersgd",
    "sketch20": "paper",
    "sketch100": "paper",
    "nominate150": "nominate",
    "lowrank150": "lowrank",
    "recommended": "lowrank",
}  # which colour
LINES = styles_of(KINDS)
TRANSPORTS = {
    "mpi": "MPI",
    "horovod": "Horovod",
    "horovod-mpi": "Horovod over MPI",
    "torch": "torch.distributed",
}
OURS = ("sketch20", "sketch100", "nominate150", "lowrank150")
DENSE = ("dense", "allreduce")
LINES_END = 0.85  # of a panel's height: above it stands text
Curve = dict[float, float]  # bit/s: seconds
World = tuple[str, int, int]
WORLD = ("transport", "dim", "hosts")  # records of one can be compared with each other


def tables(records: Sequence[Record]) -> str:
    of_worlds = [_table(world, group) for world, group in sorted(grouped(records, *WORLD).items())]
    return "\n\n".join([*of_worlds, *filter(None, [over_mpi(records)])])


def over_mpi(records: Sequence[Record]) -> str:
    """What an exchange takes over each transport in times of what it takes over MPI, where nothing limits the rate."""
    seconds = {
        (r["method"], r["hosts"], r["dim"], r["transport"]): r["seconds"]["median"]
        for r in records
        if r["rate"] == UNSHAPED
    }
    others = [each for each in TRANSPORTS if each != "mpi" and any(key[-1] == each for key in seconds)]
    rows = []
    for method, hosts, dim, transport in sorted(seconds):
        if transport == "mpi" and others:
            base_s = seconds[method, hosts, dim, "mpi"]
            taken = [seconds.get((method, hosts, dim, other)) for other in others]
            ratios = ["" if each is None else f"{1000 * each:.1f} ms, {each / base_s:.1f}" for each in taken]
            rows.append([LABELS[method], str(hosts), f"{dim:,}", f"{1000 * base_s:.1f} ms", *ratios])
    if not rows:
        return ""
    head = " | ".join(["method | hosts | coordinates | MPI", *(TRANSPORTS[other] for other in others)])
    return f"No limit to the rate: median time, and in times of MPI's\n\n{markdown(head, rows)}"


def _table(world: World, records: list[Record]) -> str:
    transport, dim, hosts = world
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    about = f"{transport}, {hosts} hosts, dim {dim:,}"
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


def plot(records: Sequence[Record], path: Path) -> list[Path]:
    """A figure for each model size, beside ``path``; panels by transport and number of hosts.

    Returns:
        The files: for several sizes ``bandwidth-25M.png`` and the like, for one ``path`` itself.
    """
    sizes = sorted(grouped(records, "dim").items())
    paths = []
    for (dim,), own in sizes:
        name = f"{dim / 1e6:g}M" if dim >= 10_000 else str(dim)
        paths.append(path.with_stem(f"{path.stem}-{name}") if len(sizes) > 1 else path)
        _plot_size(dim, grouped(own, "transport", "hosts"), paths[-1])
    return paths


def _plot_size(dim: int, worlds: Mapping[tuple[Any, ...], list[Record]], path: Path) -> None:
    transports, hosts = (sorted({world[place] for world in worlds}) for place in (0, 1))
    figure = new_figure(1 + 3.9 * len(hosts), 1.2 + 3.4 * len(transports))
    axes = figure.subplots(len(transports), len(hosts), squeeze=False, sharex=True, sharey=True)
    for row, transport in zip(axes, transports, strict=True):
        for panel, number in zip(row, hosts, strict=True):
            panel.set_visible((transport, number) in worlds)
            _draw(panel, worlds.get((transport, number), []))
            panel.set_title(f"{TRANSPORTS[transport]}, {number} hosts", fontsize="medium")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high * (high / low) ** 0.25)  # room for what is written above the curves
    for panel in axes[-1]:
        panel.set_xlabel("bandwidth of a host, bit/s; last: no limit")
    for panel in axes[:, 0]:
        panel.set_ylabel("seconds of an exchange")
    figure.suptitle(f"{dim:,} coordinates; in the corners: where ours takes less time than dense")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path, dpi=90)


def _draw(panel: Any, records: list[Record]) -> None:
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
    for line, name in enumerate(measured):  # one under the other in the corner that the curves leave free
        even, color = break_even(curves[name], dense), LINES[name]["color"]
        is_between = 0 < even <= max(finite, default=0)  # not between the fastest rate and no limit
        told = name_bandwidth(even) if is_between or even in (0, float("inf")) else "at every limited rate"
        style = {"color": color, "fontsize": "small", "ha": "right", "va": "top"}
        panel.annotate(
            f"{LABELS[name]}: {told}", (1, 1), (-4, -4 - 12 * line), "axes fraction", "offset points", **style
        )
        if is_between:
            panel.axvline(even, ymax=LINES_END, linestyle=":", linewidth=1, color=color)
    panel.set(xscale="log", yscale="log")
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
