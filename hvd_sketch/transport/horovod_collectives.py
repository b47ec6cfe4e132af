"""Horovod's own collectives, which its background thread makes: each costs milliseconds, however small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.transport.base import Handle, Pending, check_shares, finished, sum_in_rank_order
from hvd_sketch.transport.staging import to_device, to_host

HOROVOD_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


class HorovodCollectives:
    """One rank of a process set.

    Host tensors are summed here, after an alltoall: Gloo's reducescatter sends up to 1.5 times the bytes of a ring.
    CUDA tensors are given to a Horovod that was built with NCCL, whose reducescatter sums them (unless ``ordered``). A
    build for CPUs refuses CUDA tensors, and gets pinned copies on the host. This has not run on a GPU yet.

    Args:
        hvd: ``horovod.torch``, initialised.
        process_set: that holds this rank.

    Attributes:
        process_set: as given.
    """

    def __init__(self, hvd: Any, process_set: Any) -> None:
        self._hvd, self.process_set = hvd, process_set
        self._slots_in_flight: set[int] = set()

    @property
    def rank(self) -> int:
        return self.process_set.rank()

    @property
    def size(self) -> int:
        return self.process_set.size()

    @property
    def overlaps(self) -> bool:
        return self.size > 1

    def stages(self, device: torch.device) -> bool:
        return device.type != "cpu" and not (device.type == "cuda" and self._hvd.nccl_built())

    def allreduce_(self, tensor: Tensor) -> Tensor:
        ours = self._readable(tensor)
        self._hvd.allreduce_(ours, op=self._hvd.Sum, name=self._name("allreduce"), process_set=self.process_set)
        return tensor if ours is tensor else tensor.copy_(ours)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self.start_reduce_scatter(tensor, ordered).wait()

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        check_shares(tensor, self.size, "reduce_scatter")
        if tensor.numel() == 0:
            return finished(tensor.new_empty(tensor.shape[1:]))
        ours = self._readable(tensor)
        # Fixed names, equal on all ranks; operations in flight together need different ones.
        slot = next(i for i in count() if i not in self._slots_in_flight)
        name = self._name(f"reduce_scatter.{slot}")
        if ours.is_cuda and not ordered:
            pending = self._hvd.reducescatter_async(ours, op=self._hvd.Sum, name=name, process_set=self.process_set)
            self._slots_in_flight.add(slot)
            return Pending(lambda: self._finish(slot, pending)[0])
        pending = self._hvd.alltoall_async(ours, name=name, process_set=self.process_set)
        self._slots_in_flight.add(slot)
        return Pending(lambda: _back(sum_in_rank_order(list(self._finish(slot, pending))), tensor))

    def _finish(self, slot: int, pending: Any) -> Tensor:
        """What an operation of Horovod's background thread has received; its slot becomes free, also if it failed."""
        try:
            received = self._hvd.synchronize(pending)
        finally:
            self._slots_in_flight.remove(slot)
        return received[0] if isinstance(received, tuple) else received

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_shares(tensor, self.size, "alltoall")
        if tensor.numel() == 0:
            return tensor.clone()
        ours = _movable(self._readable(tensor))
        with _explaining_join():
            return _back(self._hvd.alltoall(ours, name=self._name("alltoall"), process_set=self.process_set), tensor)

    def allgather(self, tensor: Tensor) -> Tensor:
        ours = _movable(self._readable(tensor))
        with _explaining_join():
            return _back(self._hvd.allgather(ours, name=self._name("allgather"), process_set=self.process_set), tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        # Horovod names the root by its global rank, also within a process set.
        global_root = self.process_set.ranks[root] if self.process_set.ranks is not None else root
        name = self._name("broadcast")
        ours = self._readable(tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous())
        moved = _movable(ours)
        self._hvd.broadcast_(moved, global_root, name=name, process_set=self.process_set)
        return tensor.copy_(moved.view(tensor.dtype).view(tensor.shape))

    def barrier(self) -> None:
        self._hvd.barrier(process_set=self.process_set)

    def _name(self, operation: str) -> str:
        return f"hvd_sketch.{self.process_set.process_set_id}.{operation}"

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy on the host of one that Horovod cannot read on its device."""
        return to_host(tensor) if self.stages(tensor.device) else tensor


@contextmanager
def _explaining_join() -> Iterator[None]:
    """Horovod refuses these collectives once a rank has called hvd.join()."""
    try:
        yield
    except RuntimeError as error:
        if "Join" in str(error):
            error.add_note(
                "A rank left this step by hvd.join(), which cannot stand in for a compressed exchange: put the "
                "training loop into 'with optimizer.join():' on every rank instead"
            )
        raise


def _movable(tensor: Tensor) -> Tensor:
    """The tensor, or its bytes where Horovod does not know its dtype."""
    return tensor if tensor.dtype in HOROVOD_DTYPES else tensor.view(torch.uint8)


def _back(received: Tensor, like: Tensor) -> Tensor:
    """What Horovod returned, in the dtype and on the device of ``like``."""
    return to_device(received.view(like.dtype), like.device)
