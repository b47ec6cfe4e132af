"""Two ranks that share one GPU, over each carrier that is there: results checked, exchanges timed.

``python -m benchmarks.gpu.ranks OUT`` starts the jobs; a job is this module under torchrun or mpirun. NCCL takes a GPU
once: where it refuses two ranks, its job has one. Gloo and MPI copy CUDA tensors through the host.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.record import add, read
from benchmarks.methods import METHODS
from benchmarks.network.bandwidth_ranks import matrices
from benchmarks.network.checks import check
from hvd_sketch.transport import Transport, resolve_transport

NAMES = ("dense", "sketch20", "nominate150", "lowrank150")
DIMS = (1_000_000, 10_000_000)  # larger ones take the check, which is on one thread, a minute
ROUNDS = 10
JOB_LIMIT_S = 45


class Gradients:
    """Two gradients, heavy-tailed and different on each rank, in turn; to be overwritten at will."""

    def __init__(self, dim: int, rank: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(rank)
        self._vectors = [vector.to(device) for vector in torch.randn(2, dim, generator=draw).pow_(3)]

    def __call__(self, step: int) -> Tensor:
        return self._vectors[step % 2].clone()


def rank_main(out: Path, carrier: str, dims: list[int], device: torch.device) -> None:
    """What every rank of a job does."""
    if carrier in ("nccl", "gloo"):
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if carrier == "nccl" else "gloo")
    transport = resolve_transport("mpi" if carrier == "mpi" else "torch")
    rows = []
    for dim in dims:
        for name in NAMES:
            rows.append({"dim": dim, "method": name, **measure(name, dim, transport, device)})
            if transport.rank == 0:
                print(carrier, rows[-1], flush=True)
                job = {"ranks": transport.size, "stages": transport.stages(device), "rows": rows}
                add(out, "ranks", **{carrier: job})
    if carrier != "mpi":
        torch.distributed.destroy_process_group()


def measure(name: str, dim: int, transport: Transport, device: torch.device) -> dict[str, float]:
    """Milliseconds of one exchange on this rank, the median; and its collectives and staged bytes."""
    method = METHODS[name](transport, dim, matrices(dim), device)
    gradients = Gradients(dim, transport.rank, device)
    check(method, transport, gradients)
    before, times = method.ledger.totals(), []
    for step in range(ROUNDS):
        gradient = gradients(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        transport.barrier()
        started = time.perf_counter()
        method.step(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    totals = method.ledger.totals()
    collectives = (totals.collectives - before.collectives) / ROUNDS
    staged = (totals.staged_bytes - before.staged_bytes) / ROUNDS
    return {"ms": statistics.median(times), "collectives": collectives, "staged_bytes": staged}


def launch(carrier: str, ranks: int, arguments: list[str]) -> bool:
    """Run a job; whether it ended well."""
    if carrier == "mpi":
        launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [*launcher, "-m", "benchmarks.gpu.ranks", *arguments, "--carrier", carrier]
    print("+", *command, flush=True)
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait(JOB_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher then ends its ranks, which may have sessions of their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        status = 124
    print(f"{carrier}, {ranks} ranks: status {status}", flush=True)
    return status == 0


def launch_all(out: Path, is_rehearsal: bool) -> bool:
    """Every carrier; whether all that are there ended well."""
    arguments = [str(out), *(["--rehearse"] if is_rehearsal else [])]
    well = launch("gloo", 2, arguments)
    if torch.cuda.is_available():
        well &= launch("nccl", 2, arguments) or launch("nccl", 1, arguments)
    if shutil.which("mpirun") and find_spec("mpi4py"):
        well &= launch("mpi", 2, arguments)
    else:
        add(out, "ranks", **{"mpi": "no mpirun or no mpi4py here"})
    return well and bool(read(out).get("ranks"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--carrier")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.carrier is None:
        sys.exit(not launch_all(arguments.out, arguments.rehearse))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    rank_main(arguments.out, arguments.carrier, [20_000] if arguments.rehearse else list(DIMS), device)


if __name__ == "__main__":
    main()
