"""A program that does not use hvd_sketch, and fails on rank 1; what test_table.py runs under our launch scripts.

Arguments: transport; ``<act>@<point>``; folder for the time of the failure.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

NAMES = "RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"


def main(transport: str, what: str, folder: str) -> None:
    act, _, wanted = what.partition("@")
    rank = next(os.environ[name] for name in NAMES if name in os.environ)

    def reach(point: str) -> None:
        if rank != "1" or point != wanted:
            return
        (Path(folder) / "failed_at").write_text(str(time.time()))
        if act == "raise":
            raise RuntimeError("rank 1 fails on purpose")
        if act == "exit 3":
            sys.exit(3)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "crash": signal.SIGSEGV}[act])

    reach("before")
    if transport == "mpi":
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()
        reach("inside")
        MPI.COMM_WORLD.Barrier()
    elif transport == "horovod":
        import horovod.torch as hvd
        import torch

        hvd.init()
        hvd.allreduce(torch.ones(3), name="first")
        reach("inside")
        hvd.allreduce(torch.ones(3), name="second")
    else:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()
        reach("inside")
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
