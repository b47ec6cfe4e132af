"""Ranks that end at different times; run by test_horovod_transport.py under ``horovodrun --mpi``.

Argument: what follows the steps of both ranks.
"""

from __future__ import annotations

import sys
import time

import horovod.torch as hvd
import torch

from hvd_sketch.exchange.setup import require_equal
from hvd_sketch.transport import HorovodTransport, Transport
from hvd_sketch.transport.stall import watched

STEPS = 3
LATE_S = 2.0  # until Horovod has ended on all ranks, if anything of rank 0 has


def step(transport: Transport) -> None:
    with watched(transport, "a step"):
        assert transport.allreduce_(torch.ones(100_000))[0].item() == transport.size


def main(what: str) -> None:
    transport = HorovodTransport()
    part = transport.split(0)
    for _ in range(STEPS):
        step(transport)
    is_first = transport.rank == 0
    if is_first and what in ("a step", "a meeting", "a shutdown"):
        time.sleep(LATE_S)  # until rank 1 waits
    if what == "a broadcast":
        time.sleep(0 if is_first else LATE_S)
        assert transport.broadcast_(torch.full((2,), transport.rank)).tolist() == [0, 0]
        time.sleep(0 if is_first else LATE_S)
        print(f"rank {transport.rank} is done")
    elif is_first and what == "a shutdown":
        hvd.shutdown()
        time.sleep(60)
    elif not is_first:
        if what == "late":
            time.sleep(LATE_S)
        if what == "a meeting":
            require_equal(transport, {}, "meet")
        step(part if what == "a shutdown" else transport)


if __name__ == "__main__":
    main(sys.argv[1])
