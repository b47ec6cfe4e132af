"""hvd.join() as ranks see it that wait outside of Horovod's own collectives."""

from __future__ import annotations

from functools import wraps
from typing import Any
from weakref import WeakSet


class Joins:
    """Which ranks of a process set are in ``hvd.join()``. No method is collective.

    Args:
        store: of torch's, the same on all ranks, for nothing else.
        rank, size: this rank in the set, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size

    def ranks(self) -> list[int]:
        """Those that are in it now."""
        return [rank for rank in range(self._size) if self._store.check([str(rank)])]

    def enter(self) -> None:
        """This rank goes into it."""
        self._store.set(str(self._rank), "")

    def leave(self) -> None:
        """This rank comes out of it, as all do together."""
        self._store.delete_key(str(self._rank))


_watched: WeakSet[Joins] = WeakSet()


def watch_joins(hvd: Any, store: Any, rank: int, size: int) -> Joins:
    """Have ``hvd.join()`` tell the other ranks of a process set. Replaces ``hvd.join``, once per process.

    Args:
        hvd: ``horovod.torch``.
        store, rank, size: see :class:`Joins`.
    """
    joins = Joins(store, rank, size)
    _watched.add(joins)
    if not hasattr(hvd.join, "__wrapped__"):
        horovods = hvd.join

        @wraps(horovods)
        def join(*arguments: Any, **options: Any) -> Any:
            entered = list(_watched)
            for each in entered:
                each.enter()
            result = horovods(*arguments, **options)
            for each in entered:
                each.leave()
            return result

        hvd.join = join
    return joins
