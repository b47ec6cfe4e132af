"""Horovod through ``horovod.torch``, on all ranks or those of one process set."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.transport.base import Finished, Handle, check_parts, sum_in_rank_order

HOROVOD_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


class HorovodTransport:
    """One rank of a Horovod job, or of one of its process sets.

    Sums of host tensors travel as an alltoall and are added here: Gloo's reducescatter sends up to 1.5 times
    what a ring does. CUDA tensors use NCCL's reducescatter where Horovod was built with NCCL.

    Communication: the constructor calls ``hvd.init()``, which is collective the first time.

    Args:
        process_set: an ``hvd.ProcessSet`` that holds this rank; declared at ``hvd.init``. Default: all ranks.
    """

    def __init__(self, process_set: Any = None) -> None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise ImportError(
                "transport 'horovod' needs Horovod built with PyTorch: launch/setup.sh builds it, or use "
                "transport='mpi'"
            ) from error
        if not hvd.is_initialized():
            hvd.init()
        self._hvd = hvd
        self._set = process_set if process_set is not None else hvd.global_process_set
        if not self._set.included():
            raise ValueError(
                f"rank {hvd.rank()} is not in the process set {self._set.ranks}: build the transport on its ranks only"
            )
        self._slots_in_flight: set[int] = set()

    @property
    def rank(self) -> int:
        return self._set.rank()

    @property
    def size(self) -> int:
        return self._set.size()

    def allreduce_(self, tensor: Tensor) -> Tensor:
        return self._hvd.allreduce_(tensor, op=self._hvd.Sum, name=self._name("allreduce"), process_set=self._set)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return self.start_reduce_scatter(tensor).wait()

    def start_reduce_scatter(self, tensor: Tensor) -> Handle:
        check_parts(tensor, self.size, "reduce_scatter")
        if tensor.numel() == 0:
            return Finished(tensor.new_empty(tensor.shape[1:]))
        # Fixed names, equal on all ranks; operations in flight together need different ones.
        slot = next(i for i in count() if i not in self._slots_in_flight)
        self._slots_in_flight.add(slot)
        name = self._name(f"reduce_scatter.{slot}")
        if tensor.is_cuda and self._hvd.nccl_built():
            pending = self._hvd.reducescatter_async(tensor, op=self._hvd.Sum, name=name, process_set=self._set)
            return _Pending(self, slot, pending, lambda part: part[0])
        pending = self._hvd.alltoall_async(tensor, name=name, process_set=self._set)
        return _Pending(self, slot, pending, sum_in_rank_order)

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_parts(tensor, self.size, "alltoall")
        if tensor.numel() == 0:
            return tensor.clone()
        received = self._hvd.alltoall(_movable(tensor), name=self._name("alltoall"), process_set=self._set)
        return received.view(tensor.dtype)

    def allgather(self, tensor: Tensor) -> Tensor:
        gathered = self._hvd.allgather(_movable(tensor), name=self._name("allgather"), process_set=self._set)
        return gathered.view(tensor.dtype)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        # Horovod names the root by its global rank, also within a process set.
        global_root = self._set.ranks[root] if self._set.ranks is not None else root
        name = self._name("broadcast")
        moved = _movable(tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous())
        self._hvd.broadcast_(moved, global_root, name=name, process_set=self._set)
        return tensor.copy_(moved.view(tensor.dtype).view(tensor.shape))

    def barrier(self) -> None:
        self._hvd.barrier(process_set=self._set)

    def _name(self, operation: str) -> str:
        return f"hvd_sketch.{self._set.process_set_id}.{operation}"


def _movable(tensor: Tensor) -> Tensor:
    """The tensor, or its bytes where Horovod does not know its dtype."""
    return tensor if tensor.dtype in HOROVOD_DTYPES else tensor.view(torch.uint8)


class _Pending:
    """An operation under way in Horovod's background thread."""

    def __init__(self, transport: HorovodTransport, slot: int, pending: Any, finish: Any) -> None:
        self._transport, self._slot, self._pending, self._finish = transport, slot, pending, finish

    def wait(self) -> Tensor:
        received = self._transport._hvd.synchronize(self._pending)
        self._transport._slots_in_flight.remove(self._slot)
        return self._finish(received[0] if isinstance(received, tuple) else received)
