"""The best learning rate of a grid that grows where its best is at an edge, and then gets finer around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTOR = 2.0  # between neighbouring rates of the grid; its root where it is refined


@dataclass(frozen=True)
class Search:
    """What was found."""

    losses: dict[float, float]  # by learning rate, all that were tried

    @property
    def best(self) -> float:
        """The rate of the lowest loss; the lower of two equal ones."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    @property
    def at_edge(self) -> bool:
        """Whether the best is the least or the greatest rate that was tried: beyond may lie a better one."""
        return self.best in (min(self.losses), max(self.losses))


def search_rates(first: Sequence[float], loss_at: Callable[[float], float], extensions: int) -> Search:
    """Try all of ``first``, then rates beyond the edge while the best lies there, then one on either side of the best.

    ``first`` are rates a :data:`FACTOR` apart; at most ``extensions`` rates lie beyond its edges.
    """
    search = Search({rate: loss_at(rate) for rate in first})
    for _ in range(extensions):
        if not search.at_edge:
            break
        is_greatest = search.best == max(search.losses)
        further = rounded(search.best * FACTOR if is_greatest else search.best / FACTOR)
        search = Search({**search.losses, further: loss_at(further)})
    return Search({**search.losses, **{rate: loss_at(rate) for rate in beside(search.best)}})


def beside(rate: float) -> list[float]:
    """The rates on either side of one where the grid gets finer."""
    return [rounded(rate * factor) for factor in (FACTOR**-0.5, FACTOR**0.5)]


def rounded(rate: float) -> float:
    """To three digits, as people write rates; equal ones stay equal."""
    return round(rate, 2 - math.floor(math.log10(rate)))
