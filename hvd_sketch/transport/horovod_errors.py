"""Collectives that fail as Horovod's own do, whatever carries the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from hvd_sketch.transport.attendance import Attendance
from hvd_sketch.transport.base import Handle, Pending, Splitting, Transport
from hvd_sketch.transport.forwarding import ForwardingTransport
from hvd_sketch.transport.horovod_joins import watch_joins


class FailingAsHorovod(ForwardingTransport):
    """A collective that fails raises ``HorovodInternalError``, for which ``hvd.elastic.run`` waits.

    Args:
        hvd: ``horovod.torch``. Its ``join()`` tells the ranks of ``inner``.
        inner: carries the data.
        usable: entered around every collective of ``inner``.

    Attributes:
        attendance: of the inner transport, where it has one.
        can_split: whether :meth:`split` is possible.
        allreduces_by_tree: as of the inner transport.
    """

    def __init__(self, hvd: Any, inner: Transport, usable: AbstractContextManager[None] | None = None) -> None:
        from horovod.common.exceptions import HorovodInternalError

        super().__init__(inner)
        self._hvd, self._error = hvd, HorovodInternalError
        self._usable = usable if usable is not None else nullcontext()
        self._place = (hvd.rank(), hvd.size())
        self.can_split = isinstance(inner, Splitting)
        self.allreduces_by_tree: bool = getattr(inner, "allreduces_by_tree", False)
        self.attendance: Attendance | None = getattr(inner, "attendance", None)
        if self.attendance is not None:
            watch_joins(hvd, self.attendance)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        with self._as_horovods():
            return super().allreduce_(tensor)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        with self._as_horovods():
            return super().reduce_scatter(tensor, ordered)

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        with self._as_horovods():
            handle = super().start_reduce_scatter(tensor, ordered)
        return Pending(lambda: self._finish(handle.wait))

    def alltoall(self, tensor: Tensor) -> Tensor:
        with self._as_horovods():
            return super().alltoall(tensor)

    def allgather(self, tensor: Tensor) -> Tensor:
        with self._as_horovods():
            return super().allgather(tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        with self._as_horovods():
            return super().broadcast_(tensor, root)

    def barrier(self) -> None:
        with self._as_horovods():
            super().barrier()

    def split(self, color: int) -> Transport:
        """The ranks that give the same colour, in rank order. Communication: collective.

        Raises:
            ValueError: on every rank: Horovod's own collectives carry the data.
        """
        if not isinstance(self._inner, Splitting):
            raise ValueError(
                "Horovod's own collectives, which carry the data of this job, have no groups but process sets: leave "
                "out carrier='horovod' and mend what was warned of when the job began, or leave out levels=2"
            )
        with self._as_horovods():
            return FailingAsHorovod(self._hvd, self._inner.split(color), self._usable)

    def _finish(self, wait: Callable[[], Tensor]) -> Tensor:
        with self._as_horovods():
            return wait()

    @contextmanager
    def _as_horovods(self) -> Iterator[None]:
        if self._hvd.is_initialized():
            self._check_place()
        try:
            with self._usable:
                yield
        except self._error:
            raise
        except RuntimeError as error:
            raise self._error(str(error)) from error

    def _check_place(self) -> None:
        """Refuse collectives after Horovod has given this rank another number, or the job another size.

        This transport still connects the ranks of before, and those of now wait in another one.
        """
        place = (self._hvd.rank(), self._hvd.size())
        if place != self._place:
            raise ValueError(
                f"this transport was built as Horovod's rank {self._place[0]} of {self._place[1]}, which is rank "
                f"{place[0]} of {place[1]} now: wrap the plain optimizer again after hvd.init(), or in an elastic job "
                "take hvd_sketch.elastic.SketchState in place of TorchState, around the plain optimizer"
            )
