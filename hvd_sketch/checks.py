"""Arguments that cannot be meant are refused at once, by name. A bool is no number here, a string no bool."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeGuard


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``least`` and at most ``most``."""
    if isinstance(value, int) and not isinstance(value, bool):
        is_too_small, is_too_large = least is not None and value < least, most is not None and value > most
        if not (is_too_small or is_too_large):
            return
    bounds = [f"of at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
    raise ValueError(" ".join([f"{name} must be an integer", " and ".join(bounds)]).rstrip() + f", got {value!r}")


def check_number(name: str, value: object, below: float = float("inf"), most: float = float("inf")) -> None:
    """Raises ValueError unless ``value`` is a number of at least 0, below ``below`` and at most ``most``."""
    if not is_number(value) or not (0 <= value < below and value <= most):
        bounded = f"in [0, {below:g})" if most == float("inf") else f"in [0, {most:g}]"
        allowed = "finite and not negative" if min(below, most) == float("inf") else bounded
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a number above 0 and finite."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_flag(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless ``value`` is one of some choices, and of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
