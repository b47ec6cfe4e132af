"""hvd.join() as ranks see it that wait outside of Horovod's own collectives."""

from __future__ import annotations

from functools import wraps
from typing import Any
from weakref import WeakSet

from hvd_sketch.transport.attendance import Attendance, Says

_watched: WeakSet[Attendance] = WeakSet()


def watch_joins(hvd: Any, attendance: Attendance) -> None:
    """Have ``hvd.join()`` tell the ranks of an attendance. Replaces ``hvd.join``, once per process.

    Args:
        hvd: ``horovod.torch``.
        attendance: of a process set's ranks.
    """
    _watched.add(attendance)
    if hasattr(hvd.join, "__wrapped__"):
        return
    horovods = hvd.join

    @wraps(horovods)
    def join(*arguments: Any, **options: Any) -> Any:
        told = list(_watched)
        for each in told:
            each.say(Says.JOINED)
        result = horovods(*arguments, **options)
        for each in told:  # all ranks come out of it together
            each.say(Says.WAITS)
        return result

    hvd.join = join
