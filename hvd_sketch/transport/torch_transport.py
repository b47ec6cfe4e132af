"""torch.distributed: Gloo for tensors on the host, NCCL for those on a GPU, on any process group or mesh dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvd_sketch.transport.base import Handle, Pending, allgather_empty, check_shares, finished, same_color
from hvd_sketch.transport.staging import empty_on_host, to_device, to_host
from hvd_sketch.transport.torch_groups import Channel, channel_on, users_group
from hvd_sketch.transport.torch_messages import Carrier

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class TorchTransport:
    """One rank of a ``torch.distributed`` process group. Every reduce_scatter of host tensors sums in rank order.

    Messages use a group of our own with the same ranks, so that they cannot meet the user's messages. All transports of
    a process on one group share it: use them from one thread, in the same order on all ranks. Its timeout is that of
    the user's group. It is freed with the user's group.

    Host tensors travel over Gloo whatever the backend of the user's group. CUDA tensors stay on the device if that is
    NCCL, whose reduce_scatter sums them (unless ``ordered``); other groups get pinned copies on the host. On GPUs
    two ranks have exchanged over Gloo and one over NCCL, which refuses two ranks on one GPU.

    Communication: the first constructor on a group is collective, for its ranks; later ones send nothing.

    Args:
        group: a ``ProcessGroup`` that holds this rank, or a ``DeviceMesh``. Default: all ranks; where nobody has called
            ``torch.distributed.init_process_group``, torchrun's variables describe them.
        dim: of a mesh with several dimensions, the name or number of the one to exchange along; ``mesh["name"]`` as the
            group means the same.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: ``group`` does not hold this rank, was destroyed, or is of torch's MPI; there is no such dimension;
            torch is not initialised and torchrun's variables are not set; on every rank that waits: other ranks have
            come with another group.
        TimeoutError: some ranks of the group have not come within its timeout.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None = None, dim: str | int | None = None) -> None:
        self._use(channel_on(users_group(group, dim)))

    @classmethod
    def on(cls, channel: Channel) -> TorchTransport:
        """On groups that were made already. Communication: none."""
        transport = cls.__new__(cls)
        transport._use(channel)
        return transport

    def _use(self, channel: Channel) -> None:
        self.rank, self.size = channel.rank, channel.size
        self._channel = channel
        self._host, self._cuda, self.attendance = channel.host, channel.cuda, channel.attendance

    @property
    def overlaps(self) -> bool:
        return self.size > 1

    def stages(self, device: torch.device) -> bool:
        return device.type != "cpu" and not (device.type == "cuda" and self._cuda is not None)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        ours = self._readable(tensor)
        self._carrier(ours).allreduce_(ours)
        return tensor if ours is tensor else tensor.copy_(ours)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self.start_reduce_scatter(tensor, ordered).wait()

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        check_shares(tensor, self.size, "reduce_scatter")
        if tensor.numel() == 0:
            return finished(tensor.new_empty(tensor.shape[1:]))
        ours = self._readable(tensor)
        wait = self._carrier(ours).start_sum(ours, self._writable(tensor.shape[1:], tensor), ordered)
        return Pending(lambda: to_device(wait(), tensor.device))

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_shares(tensor, self.size, "alltoall")
        ours = self._readable(tensor)
        return to_device(self._carrier(ours).start_alltoall(ours)(), tensor.device)

    def allgather(self, tensor: Tensor) -> Tensor:
        if 0 in tensor.shape[1:]:
            return allgather_empty(self, tensor)
        ours = self._readable(tensor)
        gathered = self._carrier(ours).allgather(_bytes_of(ours))
        return to_device(gathered.view(tensor.dtype).view(-1, *tensor.shape[1:]), tensor.device)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        ours = self._readable(tensor)
        self._carrier(ours).broadcast_(_bytes_of(ours), root)
        return tensor if ours is tensor else tensor.copy_(ours)

    def barrier(self) -> None:
        self._host.allreduce_(torch.zeros(1, dtype=torch.float32, device="cpu"))

    def split(self, color: int) -> TorchTransport:
        """The ranks that give the same colour, in rank order. Communication: collective."""
        members = same_color(self, color)
        name = f"part {next(self._channel.parts)} of {color}"
        return TorchTransport.on(self._channel.connect_part(name, members.index(self.rank), len(members)))

    def _carrier(self, tensor: Tensor) -> Carrier:
        return self._cuda if self._cuda is not None and tensor.is_cuda else self._host

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy on the host of one that the backend cannot read on its device; complete on return."""
        return to_host(tensor) if self.stages(tensor.device) else tensor.contiguous()

    def _writable(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Memory for a sum that is needed on the device of ``like``."""
        if self.stages(like.device):
            return empty_on_host(shape, like.dtype, like.device)
        return like.new_empty(shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Its memory as uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)
