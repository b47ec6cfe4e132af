"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

TABLE_WIDTH = 80  # where the output is no terminal


def console() -> Console:
    """As wide as the terminal."""
    made = Console()
    return made if made.is_terminal else Console(width=TABLE_WIDTH)
