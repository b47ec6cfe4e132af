"""What carries data between the ranks of a Horovod job faster than Horovod's own collectives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from hvd_sketch.transport.base import Transport
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.mpi import MPITransport
from hvd_sketch.transport.torch_groups import Channel, connect
from hvd_sketch.transport.torch_transport import TorchTransport

LOOPBACK = "127.0.0.1"


def carrier_for(hvd: Any, own: HorovodCollectives) -> tuple[Transport, Any]:
    """The fastest that all ranks have, and a store of torch's that they share.

    Communication: collective, by Horovod's own collectives.

    Args:
        hvd: ``horovod.torch``, initialised.
        own: Horovod's own collectives on the ranks.
    """
    from torch.distributed import PrefixStore

    meeting = _meeting_of(own)
    carrier = _over_mpi(hvd, own) if hvd.mpi_enabled() else TorchTransport.on(_channel_at(meeting, own))
    return carrier, PrefixStore("joined", meeting.store)


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
    """Where ranks have met, by an address that no other meeting has."""

    address: str
    host: str  # this rank's own
    store: Any
    channels: list[Channel] = field(default_factory=list)  # one, where torch carries the data


def _meeting_of(own: HorovodCollectives) -> _Meeting:
    """The meeting of these ranks; a new one where any of them is new, as after a reset of an elastic job."""
    meetings = _meetings()
    ranks = own.name_of_set, own.rank, own.size
    known = meetings[ranks].address if ranks in meetings else ""
    every_known = _gather_texts(own, known)
    if not all(every_known) or len(set(every_known)) > 1:
        meetings[ranks] = _meet(own)
    return meetings[ranks]


@cache
def _meetings() -> dict[tuple[str, int, int], _Meeting]:
    """The meetings of this process, by set, rank and size."""
    return {}


def _meet(own: HorovodCollectives) -> _Meeting:
    from torch.distributed import TCPStore

    host, store = _own_address(), None
    if own.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    address = _gather_texts(own, f"{host}:{store.port}" if store is not None else "")[0]
    if store is None:
        at, _, port = address.rpartition(":")
        store = TCPStore(at, int(port), is_master=False)
    return _Meeting(address, host, store)


def _channel_at(meeting: _Meeting, own: HorovodCollectives) -> Channel:
    """Gloo, and NCCL where every rank has it. Communication: collective, the first time."""
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import default_pg_timeout, is_nccl_available

    if not meeting.channels:
        has_nccl = torch.cuda.is_available() and is_nccl_available()
        every_has_nccl = bool(own.allgather(torch.tensor([int(has_nccl)])).all())
        where = PrefixStore("channel", meeting.store), own.rank, own.size, default_pg_timeout
        meeting.channels.append(connect(*where, with_nccl=every_has_nccl, host=meeting.host))
    return meeting.channels[0]


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
