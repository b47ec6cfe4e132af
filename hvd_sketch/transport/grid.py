"""Many ranks: messages along the rows and columns of a grid, instead of from every rank to every other one.

Of 64 ranks each sends 14 messages instead of 63, of 1,024 ranks 62 instead of 1,023. A sum and an allgather send the
same bytes as before: the second half carries what the first one has put together. An alltoall carries all its bytes
twice, which pays where messages are small, as it does for an allreduce that would be a ring of the library's.
``python -m benchmarks.network.many_ranks`` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from hvd_sketch.rank_grid import goes_twice, grid_of, is_grid, passes
from hvd_sketch.transport.attendance import Attendance
from hvd_sketch.transport.base import Handle, Pending, Splitting, Transport, check_shares, name_ranks
from hvd_sketch.transport.forwarding import ForwardingTransport
from hvd_sketch.transport.stall import watched


def in_grid(transport: Transport) -> Transport:
    """A transport of many ranks as a grid; others as they are.

    Those stay direct that have under :data:`~hvd_sketch.rank_grid.GRID_RANKS` ranks, or a prime number of them, or
    cannot be split.

    Communication: none with few ranks; otherwise collective, as ``transport.split`` is.
    """
    can_split = isinstance(transport, Splitting) and getattr(transport, "can_split", True)
    return GridTransport(transport) if is_grid(transport.size) and can_split else transport


@contextmanager
def _naming(part: str, ranks: range) -> Iterator[None]:
    """A row or column counts its ranks from 0: errors inside also say which they are."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        error.add_note(f"This was in a {part} of the grid, whose ranks 0, 1, … are {name_ranks(list(ranks))}")
        raise


class GridTransport(ForwardingTransport):
    """The ranks of ``inner`` in rows and columns, in row-major order; at least four, not a prime number.

    A reduce_scatter sums over the row first, then over the column: bits may differ from those of a sum in rank order,
    which ``ordered`` still gives. Of a sum that was started only the row's half travels by itself; ``wait`` makes the
    column's.

    Communication: the constructor is collective (two splits).

    Raises:
        ValueError: ``inner`` cannot be split.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        if not isinstance(inner, Splitting):
            raise ValueError(f"a grid needs a transport that can be split, got {type(inner).__name__}")
        self._grid = rows, columns = grid_of(inner.size)
        number, place = divmod(inner.rank, columns)
        self._in_row = partial(_naming, "row", range(number * columns, (number + 1) * columns))
        self._in_column = partial(_naming, "column", range(place, inner.size, columns))
        with watched(inner, "form rows and columns of ranks"):
            self._row, self._column = inner.split(number), inner.split(rows + place)
        self.attendance: Attendance | None = getattr(inner, "attendance", None)
        self._has_tree = getattr(inner, "allreduces_by_tree", False)

    def passes(self, collective: str, payload_bytes: int) -> float:
        """How often a rank's bytes of a ring move past it; for the ledger."""
        if collective == "allreduce" and self._has_tree:
            return 1.0
        return passes(collective, payload_bytes, self._grid)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        if self._has_tree or not goes_twice(tensor.nbytes, self._grid):
            return super().allreduce_(tensor)
        with self._in_row():
            self._row.allreduce_(tensor)
        with self._in_column():
            return self._column.allreduce_(tensor)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self.start_reduce_scatter(tensor, ordered).wait()

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        if ordered:
            return super().start_reduce_scatter(tensor, ordered)
        for_columns = self._by_columns(tensor, "reduce_scatter")
        with self._in_row():
            started = self._row.start_reduce_scatter(for_columns)

        def wait() -> Tensor:
            with self._in_row():
                of_row = started.wait()
            with self._in_column():
                return self._column.reduce_scatter(of_row)

        return Pending(wait)

    def alltoall(self, tensor: Tensor) -> Tensor:
        if not goes_twice(tensor.nbytes, self._grid):
            return super().alltoall(tensor)
        for_columns = self._by_columns(tensor, "alltoall")
        with self._in_row():
            for_rows = self._row.alltoall(for_columns)  # from each column, for each row
        with self._in_column():
            return self._column.alltoall(for_rows.transpose(0, 1).contiguous()).flatten(0, 1)

    def allgather(self, tensor: Tensor) -> Tensor:
        with self._in_row():
            of_row = self._row.allgather(tensor)
        with self._in_column():
            return self._column.allgather(of_row)

    def split(self, color: int) -> Transport:
        """The ranks that give the same colour, in rank order. Communication: collective."""
        assert isinstance(self._inner, Splitting)
        return self._inner.split(color)

    def _by_columns(self, tensor: Tensor, collective: str) -> Tensor:
        """[size, ...] as [columns, rows, ...]: what is for each column, for each of its rows."""
        check_shares(tensor, self.size, collective)
        return tensor.unflatten(0, self._grid).transpose(0, 1).contiguous()
