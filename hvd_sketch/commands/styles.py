"""One colour, line and marker for each method, the same in every figure.

Colours are those that people who see few colours tell apart (Okabe and Ito 2008; the last two are Tol's).
What is not of this package is dashed.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Style(NamedTuple):
    """As matplotlib calls them."""

    color: str
    linestyle: str
    marker: str

    def options(self) -> dict[str, Any]:
        """For ``axes.plot(x, y, **options)``."""
        return self._asdict()


STYLES = {
    "dense": Style("#000000", "--", "s"),
    "bf16": Style("#999999", "--", "s"),
    "topk": Style("#E69F00", "--", "^"),
    "powersgd": Style("#CC79A7", "--", "v"),
    "nominate": Style("#56B4E9", "-", "o"),
    "lowrank": Style("#0072B2", "-", "D"),
    "random": Style("#009E73", "-", "P"),
    "sketch": Style("#D55E00", "-", "X"),
    "heavymix": Style("#DDCC77", "-", "h"),
    "paper": Style("#882255", "-.", "*"),
}
