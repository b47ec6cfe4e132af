"""Ranks that end at different times; run by test_horovod_transport.py under ``horovodrun --mpi``.

Argument: what rank 1 does after the last step of rank 0, and when.
"""

from __future__ import annotations

import sys
import time

import torch

from hvd_sketch.transport import HorovodTransport
from hvd_sketch.transport.stall import watched

STEPS = 3


def step(transport: HorovodTransport) -> None:
    with watched(transport, "a step"):
        assert transport.allreduce_(torch.ones(100_000))[0].item() == transport.size


def main(what: str) -> None:
    transport = HorovodTransport()
    for _ in range(STEPS):
        step(transport)
    if transport.rank == 0:
        if what == "shutdown":
            import horovod.torch as hvd

            hvd.shutdown()
            time.sleep(60)
        return
    if what == "later":
        time.sleep(2)  # until Horovod has ended on all ranks
    if what == "computes":
        time.sleep(2)
        print("rank 1 is done")
        return
    step(transport)


if __name__ == "__main__":
    main(sys.argv[1])
