"""What carries data between the ranks of a Horovod job faster than Horovod's own collectives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.mpi import MPITransport
from hvd_sketch.transport.torch_groups import Channel, connect
from hvd_sketch.transport.torch_transport import TorchTransport

LOOPBACK = "127.0.0.1"


def carrier_for(hvd: Any, own: HorovodCollectives) -> Transport:
    """The fastest that all ranks have.

    Communication: collective, by Horovod's own collectives.

    Args:
        hvd: ``horovod.torch``, initialised.
        own: Horovod's own collectives on the ranks.
    """
    return _over_mpi(hvd, own) if hvd.mpi_enabled() else _over_torch(own)


def _over_mpi(hvd: Any, own: HorovodCollectives) -> Transport:
    """MPI between the same ranks, where every rank may use it beside Horovod's thread; otherwise Horovod itself."""
    world_rank = _rank_in_world() if hvd.mpi_threads_supported() else -1
    world_ranks = own.allgather(torch.tensor([world_rank])).tolist()
    if -1 in world_ranks:
        return own
    return MPITransport(_communicator_of(tuple(world_ranks)))


def _rank_in_world() -> int:
    """This rank's number in MPI.COMM_WORLD; -1 where mpi4py is missing or may not be used from several threads."""
    try:
        from mpi4py import MPI
    except ImportError:
        return -1
    return MPI.COMM_WORLD.rank if MPI.Is_initialized() and MPI.Query_thread() == MPI.THREAD_MULTIPLE else -1


@cache
def _communicator_of(world_ranks: tuple[int, ...]) -> Any:
    """Communication: collective, for these ranks, the first time."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world_ranks == tuple(range(world.size)):
        return world
    return world.Create_group(world.group.Incl(list(world_ranks)))


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
    known = _gather_texts(own, meetings[ranks].address if ranks in meetings else "")
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
    address = _gather_texts(own, f"{host}:{store.port}" if store is not None else "")[0]
    if store is None:
        at, _, port = address.rpartition(":")
        store = TCPStore(at, int(port), is_master=False)
    has_nccl = torch.cuda.is_available() and is_nccl_available()
    every_has_nccl = bool(own.allgather(torch.tensor([int(has_nccl)])).all())
    where = PrefixStore("hvd_sketch", store), own.rank, own.size, default_pg_timeout
    return _Meeting(address, store, connect(*where, with_nccl=every_has_nccl, host=host))


def _gather_texts(own: HorovodCollectives, text: str) -> list[str]:
    """Every rank's text, of at most 255 bytes."""
    data = text.encode()
    padded = torch.tensor([[len(data), *data, *bytes(255 - len(data))]], dtype=torch.uint8)
    return [bytes(row[1 : 1 + row[0]]).decode() for row in own.allgather(padded).tolist()]


def _own_address() -> str:
    """This host's address in the network in which horovodrun's ranks meet."""
    server = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", LOOPBACK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server, 9))  # sends nothing
        return str(probe.getsockname()[0])
