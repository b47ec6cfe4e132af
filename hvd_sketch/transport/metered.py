"""A transport that writes every collective into a ledger, from the buffers handed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_sketch.ledger import CommLedger
from hvd_sketch.observer import Kind
from hvd_sketch.transport.attendance import Attendance
from hvd_sketch.transport.base import Handle, Pending, Transport
from hvd_sketch.transport.forwarding import ForwardingTransport
from hvd_sketch.transport.stall import process_watch

HOST = torch.device("cpu")


class MeteredTransport(ForwardingTransport):
    """Records every collective of ``inner`` in ``ledger``; with ``deterministic`` it sums in rank order."""

    def __init__(self, inner: Transport, ledger: CommLedger, deterministic: bool = False) -> None:
        super().__init__(inner)
        self.ledger = ledger
        self._deterministic = deterministic
        self._attendance: Attendance | None = getattr(inner, "attendance", None)
        self._passes: Callable[[str, int], float] = getattr(inner, "passes", lambda collective, payload_bytes: 1.0)
        self._phase, self._of_device = "start", False

    @contextmanager
    def phase(self, name: str, device: torch.device = HOST) -> Iterator[None]:
        """The collectives inside belong to the phase ``name`` of the algorithm.

        Their host tensors were copied from ``device``, and the results are needed there.
        """
        outer, self._phase, self._of_device = (self._phase, self._of_device), name, device.type != "cpu"
        try:
            with self.ledger.observer.span(Kind.PHASE, name):
                yield
        except (RuntimeError, TimeoutError) as error:
            error.add_note(f"rank {self.rank} of {self.size} was in step {self.ledger.step}, phase {name!r}")
            elsewhere = self._who_is_elsewhere(name)
            if elsewhere:
                error.add_note(elsewhere)
            raise
        finally:
            self._phase, self._of_device = outer

    def allreduce_(self, tensor: Tensor) -> Tensor:
        self._come()
        self._record("allreduce", tensor, moved=2 * tensor.nbytes, copied=8 * tensor.numel())
        with self._waiting("allreduce"):
            return super().allreduce_(tensor)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        self._come()
        self._record("reduce_scatter", tensor, moved=tensor.nbytes + tensor.nbytes // self.size)
        with self._waiting("reduce_scatter"):
            return super().reduce_scatter(tensor, ordered or self._deterministic)

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        self._come()
        self._record("reduce_scatter", tensor, moved=tensor.nbytes + tensor.nbytes // self.size)
        with self._waiting("reduce_scatter", is_end=False):
            started = super().start_reduce_scatter(tensor, ordered or self._deterministic)

        def wait() -> Tensor:
            with self._waiting("reduce_scatter"):
                return started.wait()

        return Pending(wait)

    def alltoall(self, tensor: Tensor) -> Tensor:
        self._come()
        self._record("alltoall", tensor, moved=2 * tensor.nbytes)
        with self._waiting("alltoall"):
            return super().alltoall(tensor)

    def allgather(self, tensor: Tensor) -> Tensor:
        self._come()
        with self._waiting("allgather"):
            gathered = super().allgather(tensor)
        self._record("allgather", gathered, moved=tensor.nbytes + gathered.nbytes)
        return gathered

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        self._come()
        self._record("broadcast", tensor, moved=2 * tensor.nbytes)
        with self._waiting("broadcast"):
            return super().broadcast_(tensor, root)

    def _who_is_elsewhere(self, phase: str) -> str:
        """What may be the cause of an error in a phase, in words; "": nothing is known."""
        if self._attendance is None:
            return ""
        with process_watch().over(self.rank, self.size, self.ledger.step, phase):
            self._attendance.listen()
        return self._attendance.elsewhere(phase)

    def _come(self) -> None:
        if self._attendance is not None:
            self._attendance.come()

    @contextmanager
    def _waiting(self, collective: str, is_end: bool = True) -> Iterator[None]:
        """A block in which this rank sends, receives, or waits for others, and perhaps ends the collective."""
        with self.ledger.observer.span(Kind.COLLECTIVE, collective):
            if self.size == 1:
                yield
            else:
                with process_watch().over(self.rank, self.size, self.ledger.step, self._phase, self._attendance):
                    yield
        if is_end and self._attendance is not None:
            self._attendance.leave()

    def _record(self, collective: str, payload: Tensor, moved: int, copied: int | None = None) -> None:
        """Record a collective of the whole logical vector ``payload``.

        Args:
            moved: bytes that this rank reads and writes; the transport stages them if the device needs that.
            copied: bytes that the caller copies between device and host where the payload is a host copy. Default:
                ``moved``. A histogram is copied one way, in int64: its sums stay on the host.
        """
        staged_bytes = moved if self._inner.stages(payload.device) else 0
        if payload.device.type == "cpu" and self._of_device:
            staged_bytes = moved if copied is None else copied
        passes = self._passes(collective, payload.nbytes)
        self.ledger.record(self._phase, collective, payload.dtype, payload.nbytes, self.size, staged_bytes, passes)
