"""What ranks do with checkpoints of a job: run by tests/ranks/test_saved_jobs.py as threads and as processes."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import DistributedOptimizer, load_checkpoint, save_checkpoint
from hvd_sketch.config import Compression, LowRankConfig
from hvd_sketch.transport import Transport
from hvd_sketch.transport.base import gather_texts
from tests.support.toy import Toy, little

COMPRESSIONS: dict[str, Compression | None] = {
    "sketch": little(momentum=0.5),
    "nominate": little(oversample=1, value_bits=4, candidates="nominate"),
    "low rank": LowRankConfig(rank=1, dense_below=8),
    "dense": None,
}


class Job:
    """A model in training. Its gradients follow from rank and step."""

    def __init__(self, transport: Transport, compression: Compression | None) -> None:
        self.transport, self.model = transport, Toy()
        self.model.register_buffer("seen", torch.zeros(2))  # each rank's own, as batch norm's statistics
        self.model.register_buffer("common", torch.ones(3))
        inner = torch.optim.Adam(self.model.parameters(), lr=0.1, betas=(0.0, 0.9))
        self.optimizer = DistributedOptimizer(inner, self.model.named_parameters(), compression, transport)
        self.save = partial(save_checkpoint, model=self.model, optimizer=self.optimizer)
        self.load = partial(load_checkpoint, model=self.model, optimizer=self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model.backward(self.transport.rank, step)
            self.model.seen += self.transport.rank * step
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """All that a step depends on or changes."""
        exchange = self.optimizer.exchange
        kept = [exchange.residual, exchange.velocity] if exchange is not None else []
        return [each.detach().clone() for each in (*self.model.state_dict().values(), *kept)]


def resume(transport: Transport, folder: str, compression: str) -> list[bool]:
    """Which tensors of a job that was interrupted equal those of one that was not."""
    directory = Path(folder) / compression
    job = Job(transport, COMPRESSIONS[compression])
    assert job.load(directory) is None
    job.train(range(3))
    path = job.save(directory, extra={"epoch": 7, "of": transport.rank}, own={"rank": transport.rank})
    job.train(range(3, 6))
    again = Job(transport, COMPRESSIONS[compression])
    loaded = again.load(directory)
    assert loaded is not None and (loaded.path, loaded.step, loaded.ranks) == (path, 3, transport.size)
    assert loaded.extra == {"epoch": 7, "of": 0} and loaded.own == {"rank": transport.rank}
    again.train(range(3, 6))
    return [torch.equal(ours, theirs) for ours, theirs in zip(again.tensors(), job.tensors(), strict=True)]


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """Files of this process end after some bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail_to_save(transport: Transport, folder: str) -> dict[str, Any]:
    """The last rank's disk is full: what every rank is told, what is left, and where a new job then goes on."""
    directory = Path(folder)
    job = Job(transport, COMPRESSIONS["sketch"])
    job.train(range(2))
    first = job.save(directory)
    job.train(range(2, 4))
    told = ""
    try:
        with full_disk(1000 if transport.rank == transport.size - 1 else 10**9):
            job.save(directory)
    except OSError as error:
        told = str(error)
    transport.barrier()
    left = sorted(entry.name for entry in directory.iterdir())
    loaded = Job(transport, COMPRESSIONS["sketch"]).load(directory)
    return {"told": told, "left": left, "first": first.name, "step": loaded.step if loaded else None}


def run_all(transport: Transport) -> dict[str, Any]:
    """:func:`resume` and :func:`fail_to_save` in one launch."""
    folder = gather_texts(transport, tempfile.mkdtemp(prefix="saved-jobs-") if transport.rank == 0 else "")[0]
    equal = {compression: resume(transport, folder, compression) for compression in COMPRESSIONS}
    failed = fail_to_save(transport, f"{folder}/failing")
    transport.barrier()
    if transport.rank == 0:
        shutil.rmtree(folder)
    return {"equal": equal, "failed": failed}
