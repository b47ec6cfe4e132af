"""Bandwidths, times and bytes as people write them: read and told."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_BITS_PER_S = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def bits_per_s(text: str) -> float:
    """A bandwidth such as ``1gbit``, in bits per second. Raises ValueError."""
    return _with_unit(text, _BITS_PER_S, "a bandwidth such as 100mbit or 1gbit")


def seconds(text: str) -> float:
    """A time such as ``50us``, in seconds. Raises ValueError."""
    return _with_unit(text, _SECONDS, "a time such as 50us, 3ms or 0.2s", least=0.0)


def told_seconds(value: float) -> str:
    """Three digits, in the unit that fits."""
    return _told(value, _SECONDS)


def told_bytes(value: float) -> str:
    """Three digits, in the unit that fits."""
    return _told(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0})


def told_rate(bytes_per_s: float) -> str:
    """A bandwidth, three digits."""
    return _told(8 * bytes_per_s, {"Gbit/s": 1e9, "Mbit/s": 1e6})


def _with_unit(text: str, units: Mapping[str, float], expected: str, least: float = 1e-12) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+?)(?:/s|ps)?\s*", text.lower())
    try:
        value = float(found[1]) * units[found[2]] if found else math.nan
    except (KeyError, ValueError):
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"expected {expected}, got {text!r}")
    return value


def _told(value: float, units: Mapping[str, float]) -> str:
    smallest = min(units.items(), key=lambda unit: unit[1])
    name, scale = next((unit for unit in units.items() if value >= 0.9995 * unit[1]), smallest)
    return f"{value / scale:#.3g}".rstrip(".") + f" {name}"
