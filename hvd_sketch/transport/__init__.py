"""Transports: one rank's end of MPI, Horovod or threads. Importing this starts none of them."""

from __future__ import annotations

from hvd_sketch.transport.base import Handle, Transport
from hvd_sketch.transport.horovod import HorovodTransport
from hvd_sketch.transport.local import LocalTransport, local_transports, run_local
from hvd_sketch.transport.mpi import MPITransport

__all__ = [
    "Handle",
    "HorovodTransport",
    "LocalTransport",
    "MPITransport",
    "Transport",
    "local_transports",
    "resolve_transport",
    "run_local",
]


def resolve_transport(transport: str | Transport) -> Transport:
    """A transport from its name, ``"horovod"`` or ``"mpi"``, or the transport given.

    Communication: ``"mpi"`` duplicates MPI.COMM_WORLD and ``"horovod"`` calls ``hvd.init()``; both are collective, once
    per process.
    """
    if transport == "mpi":
        return MPITransport()
    if transport == "horovod":
        return HorovodTransport()
    if isinstance(transport, Transport):
        return transport
    raise ValueError(
        f"transport must be 'horovod', 'mpi' or a Transport, got {transport!r}: a communicator goes into "
        "MPITransport(comm), a process set into HorovodTransport(process_set)"
    )
