"""What test_horovod_transport.py runs on every rank: what carries the data, and what is left after an error."""

from __future__ import annotations

import gc
import logging
from logging.handlers import BufferingHandler
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_sketch.transport import HorovodTransport, horovod_carriers, horovod_joins
from hvd_sketch.transport.horovod_addresses import INTERFACE_VARIABLES
from hvd_sketch.transport.horovod_collectives import HorovodCollectives
from tests.support.setup_targets import error_of


def carriers(transport: HorovodTransport) -> dict[str, Any]:
    """What carries data by default, by request, and where no rank has the interface that is asked for."""
    used = {"auto": transport, "torch": HorovodTransport(carrier="torch")}
    used["horovod"] = HorovodTransport(carrier="horovod")
    said = BufferingHandler(100)
    logging.getLogger(horovod_carriers.__name__).addHandler(said)
    meeting = horovod_carriers._meetings().pop(hvd.global_process_set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERFACE_VARIABLES[0], "nowhere0" if transport.rank else "lo")
        used["nowhere"] = HorovodTransport(carrier="torch")
    assert used["nowhere"].allreduce_(torch.ones(1)).item() == transport.size
    horovod_carriers._meetings()[hvd.global_process_set] = meeting
    logging.getLogger(horovod_carriers.__name__).removeHandler(said)
    for carrier in ("auto", "torch"):
        again = HorovodTransport(carrier=carrier)
        assert used[carrier]._inner._channel is again._inner._channel, "ranks that have met need not meet again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_sketch.transport.horovod.has_nccl", lambda: transport.rank == 1)
        assert HorovodTransport().carrier == "torch", "one rank's GPU decides for all"
    names = {name: each.carrier for name, each in used.items()}
    assert transport.allreduces_by_tree == (names["auto"] == "mpi"), "which the ledger of many ranks looks at"
    names["mpi"] = error_of(lambda: HorovodTransport(carrier="mpi"))
    return {**names, "said": [record.getMessage() for record in said.buffer]}


def part_of_a_lost_rank(transport: HorovodTransport) -> str:
    """The error of a collective on a part of the ranks, one of which is gone; joins are told to the part's ranks."""
    part = transport.split(0)
    assert part.attendance is not transport.attendance and part.attendance in horovod_joins._watched
    part.barrier()
    if transport.rank == 1:
        del part
        gc.collect()  # which ends its connections
        return ""
    with pytest.raises(HorovodInternalError) as caught:
        part.allreduce_(torch.ones(100_000))
    return str(caught.value)


def slots_left(transport: HorovodTransport) -> list[int]:
    """Slots in use after a start and a wait that fail; the ranks disagree, and all ranks are told."""
    own = HorovodCollectives(hvd, hvd.global_process_set)
    left = []
    with pytest.raises(TypeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd, "alltoall_async", None)
        own.start_reduce_scatter(torch.ones(own.size, 3))
    left.append(len(own._slots_in_flight))
    handle = own.start_reduce_scatter(torch.ones(own.size, 3, 1 + own.rank))  # shapes that differ
    with pytest.raises(HorovodInternalError):
        handle.wait()
    left.append(len(own._slots_in_flight))
    assert own.reduce_scatter(torch.ones(own.size, 3)).tolist() == [own.size] * 3
    return left
