"""MPI through mpi4py, which reads and writes the memory of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvd_sketch.transport.base import Handle, Pending, allgather_empty, check_shares, peers_of, sum_in_rank_order
from hvd_sketch.transport.mpi_setup import abort_on_uncaught_exceptions, channel_on, check_communicator, import_mpi
from hvd_sketch.transport.staging import empty_on_host, to_host

if TYPE_CHECKING:
    from mpi4py import MPI

# MPI 3 counts elements in C ints; Open MPI 4.1 fails from 2^31 on.
MAX_COUNT = 2**31 - 1
SUMMABLE = (torch.float32, torch.float64, torch.int32, torch.int64)
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16}


class MPITransport:
    """One rank of an MPI communicator. Every reduce_scatter sums in rank order.

    Messages use a duplicate of the communicator, so that they cannot meet the user's messages. All transports of a
    process on one communicator share the duplicate, and so the order of messages: use them from one thread, in the same
    order on all ranks. ``comm.Free()`` also frees the duplicate and ends these transports. The duplicate of
    MPI.COMM_WORLD lives as long as MPI.

    From construction on an exception that nobody catches aborts the whole job (``sys.excepthook``): MPI itself would
    leave the other ranks waiting.

    CUDA tensors are given to an MPI library that says it takes them; other libraries get pinned copies on the host.
    This has not run on a GPU yet.

    Communication: the first constructor on a communicator is collective (``Comm.Dup``), later ones send nothing.

    Args:
        comm: an ``mpi4py.MPI.Intracomm`` that holds this rank; default ``MPI.COMM_WORLD``.
        max_count: largest element count of one MPI call; longer vectors go in chunks.

    Raises:
        TypeError: ``comm`` is no communicator.
        ValueError: ``comm`` is ``MPI.COMM_NULL`` or an inter-communicator; MPI is not initialised, or is finalised.
    """

    allreduces_by_tree = True  # small ones, in log2(size) messages

    def __init__(self, comm: MPI.Intracomm | None = None, max_count: int = MAX_COUNT) -> None:
        if max_count < 1:
            raise ValueError(f"max_count must be at least 1, got {max_count}")
        self._mpi = import_mpi()
        abort_on_uncaught_exceptions(self._mpi)
        users = comm if comm is not None else self._mpi.COMM_WORLD
        check_communicator(self._mpi, users)
        self._channel = channel_on(self._mpi, users)
        self._comm, self._progress = self._channel.comm, self._channel.progress
        self.rank, self.size = self._comm.rank, self._comm.size
        self.attendance = self._channel.attendance
        self._max_count = max_count
        self._takes_cuda = _takes_cuda(self._mpi)

    @property
    def overlaps(self) -> bool:
        return self._progress is not None

    def stages(self, device: torch.device) -> bool:
        return device.type != "cpu" and not (device.type == "cuda" and self._takes_cuda)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        _check_summable(tensor)
        ours = self._readable(tensor)
        flat = ours.view(-1)
        for chunk in self._chunks(flat.numel()):
            self._comm.Allreduce(self._mpi.IN_PLACE, flat[chunk])
        return tensor if ours is tensor else tensor.copy_(ours)

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self._start_sum(tensor).wait()

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        pending = self._start_sum(tensor)
        return self._progress.drive(pending) if self._progress is not None else pending

    def alltoall(self, tensor: Tensor) -> Tensor:
        check_shares(tensor, self.size, "alltoall")
        result = self._writable(tensor.shape, tensor)
        outgoing, incoming = self._shares(self._readable(tensor)), self._shares(result)
        requests = self._start_exchange(outgoing, incoming)
        incoming[self.rank].copy_(outgoing[self.rank])
        self._mpi.Request.Waitall(requests)
        return result.to(tensor.device, non_blocking=True)

    def allgather(self, tensor: Tensor) -> Tensor:
        if 0 in tensor.shape[1:]:
            return allgather_empty(self, tensor)
        # A message brings its own length, so no round is spent on exchanging the sizes beforehand.
        source = _plain(self._readable(tensor).view(-1))
        requests = [self._comm.Isend(piece, peer) for peer in self._others() for piece in self._pieces(source)]
        arriving = {peer: self._probe(peer, source) for peer in reversed(self._others())}
        lengths = {self.rank: source.numel()} | {peer: length for peer, (_, length) in arriving.items()}
        if max(lengths.values()) >= self._max_count:
            received = {peer: self._receive_pieces(peer, *arriving[peer], source) for peer in arriving}
            whole = torch.cat([source if rank == self.rank else received[rank] for rank in range(self.size)])
        else:
            whole = _plain(self._writable((sum(lengths.values()),), tensor))
            slots = whole.split([lengths[rank] for rank in range(self.size)])
            requests += [message.Irecv(slots[peer]) for peer, (message, _) in arriving.items()]
            slots[self.rank].copy_(source)
        self._mpi.Request.Waitall(requests)
        return whole.view(tensor.dtype).view(-1, *tensor.shape[1:]).to(tensor.device, non_blocking=True)

    def _pieces(self, flat: Tensor) -> Iterator[Tensor]:
        """The messages for a vector: all but the last have ``max_count`` elements, and the last has fewer."""
        for start in range(0, flat.numel() + 1, self._max_count):
            yield flat[start : start + self._max_count]

    def _probe(self, peer: int, like: Tensor) -> tuple[MPI.Message, int]:
        """The next message of a peer, and how many elements it has."""
        status = self._mpi.Status()
        message = self._comm.Mprobe(peer, status=status)
        # Get_count does not count beyond 2^31 bytes.
        return message, status.Get_elements(self._mpi.BYTE) // like.element_size()

    def _receive_pieces(self, peer: int, message: MPI.Message, length: int, like: Tensor) -> Tensor:
        """All that a peer sends, from its first message on."""
        pieces = [like.new_empty(length)]
        message.Recv(pieces[-1])
        while pieces[-1].numel() == self._max_count:
            message, length = self._probe(peer, like)
            pieces.append(like.new_empty(length))
            message.Recv(pieces[-1])
        return torch.cat(pieces)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        ours = self._readable(tensor)
        flat = _plain(ours.view(-1))
        for chunk in self._chunks(flat.numel()):
            self._comm.Bcast(flat[chunk], root)
        return tensor if ours is tensor else tensor.copy_(ours)

    def barrier(self) -> None:
        self._comm.Barrier()

    def split(self, color: int) -> MPITransport:
        """The ranks that give the same colour, in rank order, until the communicator is freed.

        Parts of the same ranks share a communicator, as transports on one communicator do. Communication: collective.
        """
        colors = self.allgather(torch.tensor([color], device="cpu")).tolist()
        return type(self)(self._channel.part(colors), self._max_count)

    def _start_sum(self, tensor: Tensor) -> Handle:
        # Each share goes directly to the rank that adds it: the bytes of a ring without its rounds. Three sums of
        # 10 MB took 8 ms on 2 ranks and 27 ms on 4 (loopback TCP); MPI_Reduce_scatter took 51 and 36 ms.
        check_shares(tensor, self.size, "reduce_scatter")
        _check_summable(tensor)
        ours = self._readable(tensor)
        outgoing, incoming = self._shares(ours), self._shares(torch.empty_like(ours))
        requests = self._start_exchange(outgoing, incoming)
        incoming[self.rank] = outgoing[self.rank]
        total = self._writable(tensor.shape[1:], tensor)

        def wait() -> Tensor:
            self._mpi.Request.Waitall(requests)
            sum_in_rank_order(incoming, out=total.view(-1))
            return total.to(tensor.device, non_blocking=True)

        return Pending(wait)

    def _start_exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[MPI.Request]:
        """Begin to send ``outgoing[i]`` to rank i and to receive ``incoming[i]`` from rank i, for all other ranks.

        Messages between two ranks arrive in the order of sending, so exchanges that begin in the same order on all
        ranks do not mix.
        """
        requests = []
        for peer in reversed(self._others()):  # from the rank to the left first: its first message is for this rank
            for chunk in self._chunks(incoming[peer].numel()):
                requests.append(self._comm.Irecv(incoming[peer][chunk], peer))
        for peer in self._others():
            for chunk in self._chunks(outgoing[peer].numel()):
                requests.append(self._comm.Isend(outgoing[peer][chunk], peer))
        return requests

    def _others(self) -> list[int]:
        return peers_of(self.rank, self.size)

    def _chunks(self, total: int) -> Iterator[slice]:
        for start in range(0, total, self._max_count):
            yield slice(start, start + self._max_count)

    def _shares(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` [size, ...] as flat vectors that MPI can take, one for each rank."""
        return list(_plain(tensor.view(self.size, tensor.numel() // self.size)))

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy in memory that MPI can read; complete on return."""
        if self.stages(tensor.device):
            return to_host(tensor)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return tensor.contiguous()

    def _writable(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory that MPI can write to, for a result that is needed on the device of ``like``."""
        if self.stages(like.device):
            return empty_on_host(shape, like.dtype, like.device)
        return like.new_empty(shape)


def _takes_cuda(mpi: Any) -> bool:
    """Whether the MPI library says that it reads and writes CUDA memory itself."""
    query = getattr(ctypes.CDLL(mpi.__file__), "MPIX_Query_cuda_support", None)  # mpi4py does not pass it on
    return query is not None and query() == 1


def _plain(tensor: Tensor) -> Tensor:
    """Dtypes that MPI lacks travel as integers of their size: bool, float16, bfloat16."""
    return tensor.view(INTEGER_OF_SIZE.get(tensor.element_size(), tensor.dtype))


def _check_summable(tensor: Tensor) -> None:
    if tensor.dtype not in SUMMABLE:
        raise TypeError(f"sums need float32, float64, int32 or int64, got {tensor.dtype}: sum in float32")
