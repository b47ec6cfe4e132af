"""Horovod's ranks, on all of a job or on one of its process sets, and what carries data between them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from hvd_sketch.transport.base import Transport, gather_texts
from hvd_sketch.transport.horovod_carriers import carrier_for, has_nccl
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.horovod_errors import FailingAsHorovod
from hvd_sketch.transport.horovod_mpi import connect_over_mpi
from hvd_sketch.transport.open_mpi import locate_open_mpi

CARRIERS = ("auto", "mpi", "torch", "horovod")


class HorovodTransport(FailingAsHorovod):
    """One rank of a Horovod job, or of one of its process sets.

    Ranks, sizes, process sets and the life of the job are Horovod's. Data travel without its background thread, which
    takes milliseconds for a collective however small:

    - ``"mpi"``: by a communicator of our own, where Horovod runs over MPI and there is mpi4py for the same library.
    - ``"torch"``: over Gloo and, for CUDA tensors, NCCL, by groups of torch's that the ranks form through Horovod. Gloo
      uses the interfaces that GLOO_SOCKET_IFNAME or horovodrun's ``--network-interfaces`` name.
    - ``"horovod"``: by Horovod's own collectives, also where the ranks reach no common address over TCP.
    - ``"auto"``: by the first of these that can be had; where a rank has NCCL, not by MPI.

    Where a carrier fails the error is ``HorovodInternalError``, as Horovod's own: an elastic job goes on after it. With
    MPI an exception that nobody catches aborts the whole job, as with :class:`MPITransport`.

    Communication: the constructor is collective, for the ranks of the set; it calls ``hvd.init()`` the first time.

    Args:
        process_set: an ``hvd.ProcessSet`` that holds this rank; declared at ``hvd.init``. Default: all ranks.
        carrier: of the data; equal on all ranks.

    Attributes:
        carrier: what it is: ``"mpi"``, ``"torch"`` or ``"horovod"``.

    Raises:
        TypeError: ``process_set`` is no ``hvd.ProcessSet``.
        ValueError: ``process_set`` is not registered with Horovod, or does not hold this rank; there is no such
            carrier; on every rank: the ranks were given different ones, or MPI, which they cannot use.
    """

    def __init__(self, process_set: Any = None, carrier: Literal["auto", "mpi", "torch", "horovod"] = "auto") -> None:
        locate_open_mpi()  # for a Horovod built with MPI
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise ImportError(
                "transport 'horovod' needs Horovod built with PyTorch: launch/setup.sh builds it, or use "
                "transport='torch' or 'mpi'"
            ) from error
        if carrier not in CARRIERS:
            raise ValueError(f"carrier must be one of {', '.join(map(repr, CARRIERS))}, got {carrier!r}")
        if not hvd.is_initialized():
            hvd.init()
        self._set = process_set if process_set is not None else hvd.global_process_set
        _check_process_set(hvd, self._set)
        own = HorovodCollectives(hvd, self._set)
        _check_carriers(own, carrier)
        self.carrier, inner, usable = _carrier(hvd, own, carrier)
        super().__init__(hvd, inner, usable)

    @property
    def rank(self) -> int:
        return self._set.rank()

    @property
    def size(self) -> int:
        return self._set.size()


def _carrier(hvd: Any, own: HorovodCollectives, carrier: str) -> tuple[str, Transport, AbstractContextManager[None]]:
    """What carries the data, by name, too, and what holds every collective.

    Communication: collective, by Horovod's own collectives.

    Raises: see :class:`HorovodTransport`.
    """
    if carrier == "horovod":
        return "horovod", own, nullcontext()
    if carrier in ("auto", "mpi"):
        over_mpi = connect_over_mpi(hvd, own, is_wanted=carrier == "mpi" or not has_nccl())
        if over_mpi is not None:
            return "mpi", *over_mpi
        if carrier == "mpi":
            raise ValueError(
                f"carrier='mpi' expected Horovod to run over MPI with MPI_THREAD_MULTIPLE, and mpi4py built for the "
                f"same MPI library on all ranks (seen from rank {own.rank}): start the job by mpirun or "
                "`horovodrun --mpi`, or leave out the carrier"
            )
    inner = carrier_for(own)
    return "horovod" if inner is own else "torch", inner, nullcontext()


def _check_carriers(own: HorovodCollectives, carrier: str) -> None:
    """Refuse carriers that differ between ranks, which would wait for each other. Communication: collective."""
    carriers = gather_texts(own, carrier)
    if len(set(carriers)) > 1:
        raise ValueError(
            f"HorovodTransport expected the same carrier on all ranks, got {', '.join(map(repr, carriers))} in rank "
            f"order (seen from rank {own.rank}): give one carrier to all"
        )


def _check_process_set(hvd: Any, process_set: Any) -> None:
    """Refuse a value that is no process set, and a set that this rank cannot use. Communication: none."""
    if not isinstance(process_set, hvd.ProcessSet):
        raise TypeError(
            f"HorovodTransport expected an hvd.ProcessSet, got {process_set!r} ({type(process_set).__name__}) on rank "
            f"{hvd.rank()}: declare one with hvd.init(process_sets=[hvd.ProcessSet([0, 1])]), or give none for all"
        )
    if not _is_registered(process_set):
        raise ValueError(
            f"HorovodTransport expected a process set that Horovod knows, got {process_set} on rank {hvd.rank()}: "
            "declare it with hvd.init(process_sets=[…]), again after hvd.shutdown(), and before the transport is built"
        )
    if not process_set.included():
        raise ValueError(
            f"rank {hvd.rank()} is not in the process set {process_set.ranks}: build the transport on its ranks only"
        )


def _is_registered(process_set: Any) -> bool:
    """Whether the running Horovod knows the set. A Horovod that was shut down leaves its number in the set."""
    try:
        return process_set.size() is not None
    except ValueError:
        return False
