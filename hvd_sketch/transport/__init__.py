"""Transports: one rank's end of torch.distributed, Horovod, MPI or threads. Importing this starts none of them."""

from __future__ import annotations

from hvd_sketch.transport.base import Handle, Transport
from hvd_sketch.transport.choice import resolve_transport
from hvd_sketch.transport.horovod import HorovodTransport
from hvd_sketch.transport.local import LocalTransport, local_transports, run_local
from hvd_sketch.transport.mpi import MPITransport
from hvd_sketch.transport.torch_transport import TorchTransport

__all__ = [
    "Handle",
    "HorovodTransport",
    "LocalTransport",
    "MPITransport",
    "TorchTransport",
    "Transport",
    "local_transports",
    "resolve_transport",
    "run_local",
]
