"""What bandwidth.py shows: tables in Markdown, and up to which bandwidth compression pays.

The time of an exchange is what its rank computes plus bytes over bandwidth: a straight line in 1 / bandwidth, where an
unlimited network is the point 0. So between measured points the times are interpolated along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from benchmarks.figures import Record, grouped, markdown, styles_of
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
    """Below which, as people say it: "below 630 Mbit/s"."""
    if bandwidth in (0.0, float("inf")):
        return "at no rate measured" if bandwidth == 0.0 else "at every rate measured"
    return f"below {told_bandwidth(bandwidth)}"


def told_bandwidth(bandwidth: float) -> str:
    """With two digits: "630 Mbit/s"."""
    value = float(f"{bandwidth:.2g}")
    return f"{value / 1e9:g} Gbit/s" if value >= 1e9 else f"{value / 1e6:g} Mbit/s"
