"""Many ranks as a grid of rows and columns: its shape, and how often a payload moves where messages go along both."""

from __future__ import annotations

import math

GRID_RANKS = 32  # the fewest that form a grid: benchmarks/results/README.md, "Many ranks"
MESSAGE_BYTES = 8192  # that could travel in the time that a message costs: 65 microseconds at 1 Gbit/s


def grid_of(ranks: int) -> tuple[int, int]:
    """Rows and columns, as near to a square as the divisors of ``ranks`` allow; one row for prime numbers."""
    rows = next(rows for rows in range(math.isqrt(ranks), 0, -1) if ranks % rows == 0)
    return rows, ranks // rows


def is_grid(ranks: int) -> bool:
    """Whether so many ranks exchange along rows and columns, if their transport can be split."""
    return ranks >= GRID_RANKS and grid_of(ranks)[0] > 1


def messages_of(ranks: int) -> int:
    """How many messages a rank sends in a collective along the rows and columns of a grid."""
    return sum(grid_of(ranks)) - 2


def goes_twice(payload_bytes: float, grid: tuple[int, int]) -> bool:
    """Whether an alltoall or an allreduce of so many bytes goes along rows and columns, each of which carries it all.

    It does where the messages that this saves cost more than the bytes that it adds.
    """
    rows, columns = grid
    saved = rows * columns - 1 - (rows + columns - 2)
    added = (rows - 1) / rows + (columns - 1) / columns - (rows * columns - 1) / (rows * columns)
    return payload_bytes * added <= MESSAGE_BYTES * saved


def passes(collective: str, payload_bytes: float, grid: tuple[int, int]) -> float:
    """How often a rank's bytes of a ring move past it in a grid. Sums and allgathers send the bytes of a ring."""
    if collective not in ("alltoall", "allreduce") or not goes_twice(payload_bytes, grid):
        return 1.0
    rows, columns = grid
    ranks = rows * columns
    return ((rows - 1) / rows + (columns - 1) / columns) / ((ranks - 1) / ranks)
