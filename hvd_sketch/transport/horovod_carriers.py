"""What carries data between the ranks of a Horovod job faster than Horovod's own collectives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hvd_sketch.transport.base import Transport, gather_texts
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.torch_groups import Channel, connect
from hvd_sketch.transport.torch_transport import TorchTransport

LOOPBACK = "127.0.0.1"


def carrier_for(hvd: Any, own: HorovodCollectives) -> Transport:
    """The fastest that is safe: groups of torch's, or Horovod's own collectives where it runs over MPI.

    There MPI itself would be faster. But where Horovod ends on one rank it ends MPI on all, also under a rank that
    waits in MPI, which then crashes.

    Communication: collective, by Horovod's own collectives.

    Args:
        hvd: ``horovod.torch``, initialised.
        own: Horovod's own collectives on the ranks.
    """
    return own if hvd.mpi_enabled() else _over_torch(own)


@dataclass(frozen=True)
class _Meeting:
    """Groups of torch's, and the store where their ranks met, at an address that no other meeting has."""

    address: str
    store: Any
    channel: Channel


def _over_torch(own: HorovodCollectives) -> Transport:
    """Gloo, and NCCL where every rank has it, on new groups where any rank is new, as in an elastic job."""
    meetings = _meetings()
    ranks = own.name_of_set, own.rank, own.size
    known = gather_texts(own, meetings[ranks].address if ranks in meetings else "")
    if not all(known) or len(set(known)) > 1:
        meetings[ranks] = _meet(own)
    return TorchTransport.on(meetings[ranks].channel)


@cache
def _meetings() -> dict[tuple[str, int, int], _Meeting]:
    """The meetings of this process, by set, rank and size."""
    return {}


def _meet(own: HorovodCollectives) -> _Meeting:
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.distributed_c10d import default_pg_timeout, is_nccl_available

    host, store = _own_address(), None
    if own.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    address = gather_texts(own, f"{host}:{store.port}" if store is not None else "")[0]
    if store is None:
        at, _, port = address.rpartition(":")
        store = TCPStore(at, int(port), is_master=False)
    has_nccl = torch.cuda.is_available() and is_nccl_available()
    every_has_nccl = bool(own.allgather(torch.tensor([int(has_nccl)])).all())
    where = PrefixStore("hvd_sketch", store), own.rank, own.size, default_pg_timeout
    return _Meeting(address, store, connect(*where, with_nccl=every_has_nccl, host=host))


def _own_address() -> str:
    """This host's address in the network in which horovodrun's ranks meet."""
    server = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", LOOPBACK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server, 9))  # sends nothing
        return str(probe.getsockname()[0])
