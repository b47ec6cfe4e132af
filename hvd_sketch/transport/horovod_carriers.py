"""What carries data between the ranks of a Horovod job faster than Horovod's own collectives."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hvd_sketch.transport.base import Transport, gather_texts, name_ranks
from hvd_sketch.transport.horovod_addresses import (
    INTERFACE_VARIABLES,
    NOT_REACHED,
    addresses_towards,
    own_addresses,
)
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from hvd_sketch.transport.torch_groups import Channel, connect
from hvd_sketch.transport.torch_transport import TorchTransport

LOOPBACK = "127.0.0.1"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Meeting:
    """Ranks that have met at a store, and the groups of torch's between them.

    Attributes:
        name: that no other meeting has; equal on all ranks.
        rank, size: this rank, and how many there are.
        channel: None where the ranks reach no address together.
    """

    name: str
    rank: int
    size: int
    store: Any
    channel: Channel | None


def carrier_for(own: HorovodCollectives) -> Transport:
    """Groups of torch's (Gloo, and NCCL where every rank has it), or Horovod's own where they cannot be formed.

    Communication: collective, by Horovod's own collectives.

    Args:
        own: Horovod's own collectives on the ranks.
    """
    meetings = _meetings()
    before = meetings.get(own.process_set)
    is_of_now = before is not None and (before.rank, before.size) == (own.rank, own.size)
    known = gather_texts(own, before.name if before is not None and is_of_now else "")
    if not all(known) or len(set(known)) > 1:  # any rank is new, as in an elastic job
        if before is not None and before.channel is not None:
            before.channel.attendance.close()
        meetings[own.process_set] = _meet(own)
    channel = meetings[own.process_set].channel
    return own if channel is None else TorchTransport.on(channel)


@cache
def _meetings() -> WeakKeyDictionary[Any, _Meeting]:
    """The last meeting of each process set."""
    return WeakKeyDictionary()


def _meet(own: HorovodCollectives) -> _Meeting:
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.distributed_c10d import default_pg_timeout

    offers, store = own_addresses(), None
    if own.rank == 0:
        store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)  # it listens on all interfaces
    name = gather_texts(own, " ".join([str(store.port), *offers]) if store is not None else "")[0]
    port, *offers = name.split()
    places = [text.split() for text in gather_texts(own, " ".join(addresses_towards(offers, int(port))))]
    usable = [i for i in range(len(offers)) if all(place[i] != NOT_REACHED for place in places)]
    if not usable:
        _warn(own, offers, places)
        return _Meeting(name, own.rank, own.size, store, None)
    if store is None:
        store = TCPStore(offers[usable[0]], int(port), is_master=False)
    every_has_nccl = bool(own.allgather(torch.tensor([int(has_nccl())], device="cpu")).all())
    where = PrefixStore("hvd_sketch", store), own.rank, own.size, default_pg_timeout
    channel = connect(*where, with_nccl=every_has_nccl, host=places[own.rank][usable[0]])
    return _Meeting(name, own.rank, own.size, store, channel)


def has_nccl() -> bool:
    """Whether this rank has a GPU, and torch NCCL for it. Communication: none."""
    from torch.distributed.distributed_c10d import is_nccl_available

    return torch.cuda.is_available() and is_nccl_available()


def _warn(own: HorovodCollectives, offers: list[str], places: list[list[str]]) -> None:
    """Say on rank 0 why Horovod's own collectives carry the data, and what to do."""
    if own.rank > 0:
        return
    lonely = [rank for rank, place in enumerate(places) if set(place) <= {NOT_REACHED}]
    who = f"{name_ranks(lonely)} of {own.size} cannot connect" if lonely else "not all ranks can connect to the same"
    logger.warning(
        "Data travel by Horovod's own collectives, which take milliseconds each and name no rank that does not come: "
        "of rank 0's IPv4 addresses (%s) %s. Name an interface that all hosts have in %s.",
        *(", ".join(offers) or "none", who, INTERFACE_VARIABLES[0]),
    )
