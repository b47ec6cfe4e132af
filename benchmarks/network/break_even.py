"""Up to which bandwidth does it pay?

The time of an exchange is what its rank computes plus bytes over bandwidth: a straight line in 1 / bandwidth, where an
unlimited network is the point 0. So between measured points the times are interpolated along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from benchmarks.network.lab import bits_per_s
from benchmarks.network.records import Record

OURS = ("sketch20", "sketch100")
DENSE = ("dense", "allreduce")
Curve = dict[float, float]  # bit/s: seconds


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


def break_even(ours: Mapping[float, float], theirs: Mapping[float, float]) -> float:
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
