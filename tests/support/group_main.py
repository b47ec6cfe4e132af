"""A job in which some of the ranks exchange among themselves: run by test_groups.py.

Arguments: "torch", "mpi" or "horovod", folder for the results. Ranks 0 and 2 are one group, the others another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hvd_sketch.transport import HorovodTransport, MPITransport, TorchTransport, Transport
from tests.support.contract import check_all
from tests.support.targets import run_steps

FIRST = [0, 2]
EXCHANGE = {"dim": 5000, "steps": 3, "config": {"cols": 600, "k": 50, "deterministic": True}}


def torch_group() -> tuple[int, Transport]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, others = dist.get_rank(), [rank for rank in range(dist.get_world_size()) if rank not in FIRST]
    first, second = dist.new_group(FIRST), dist.new_group(others)
    mine, other = (first, second) if rank in FIRST else (second, first)
    try:
        TorchTransport(other)
    except ValueError as error:
        assert f"got one without rank {rank}" in str(error)
    else:
        raise AssertionError("a rank joined a group that does not hold it")
    transport = TorchTransport(mine)
    check_all(transport)
    return rank, transport


def mpi_group() -> tuple[int, Transport]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    group = world.Split(color=int(world.rank in FIRST), key=world.rank)
    transport = MPITransport(group)
    assert MPI.Comm.Compare(transport._comm, group) == MPI.CONGRUENT, "a duplicate: our traffic meets nobody else's"
    check_all(transport)
    return world.rank, transport


def horovod_group() -> tuple[int, Transport]:
    import horovod.torch as hvd

    sets = [hvd.ProcessSet(FIRST), hvd.ProcessSet([1])]
    hvd.init(process_sets=sets)
    mine = sets[0] if hvd.rank() in FIRST else sets[1]
    other = sets[1] if hvd.rank() in FIRST else sets[0]
    try:
        HorovodTransport(other)
    except ValueError as error:
        assert "not in the process set" in str(error)
    else:
        raise AssertionError("a rank joined a process set that does not hold it")
    transport = HorovodTransport(mine)
    check_all(transport)
    return hvd.rank(), transport


def main(kind: str, folder: str) -> None:
    world_rank, transport = {"torch": torch_group, "mpi": mpi_group, "horovod": horovod_group}[kind]()
    result = {"rank": transport.rank, "size": transport.size, **run_steps(transport, **EXCHANGE)}
    torch.save(result, Path(folder) / f"{world_rank}.pt")
    if kind == "horovod":
        import horovod.torch as hvd

        hvd.barrier()  # a rank that leaves ends Horovod for all, in the other group too


if __name__ == "__main__":
    main(*sys.argv[1:])
