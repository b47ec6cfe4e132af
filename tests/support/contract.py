"""What every transport must do, run by test_transports.py on each kind and several world sizes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, Literal

import torch

from hvd_sketch.transport import HorovodTransport, Transport
from hvd_sketch.transport.forwarding import ForwardingTransport
from hvd_sketch.transport.grid import GridTransport
from hvd_sketch.transport.torch_messages import DeviceCollectives

SUMMABLE = [torch.float32, torch.float64, torch.int32, torch.int64]
MOVABLE = [*SUMMABLE, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.int16]
LENGTHS = [0, 1, 2, 7, 1000]


def check_all(
    transport: Any,
    max_count: int | None = None,
    staged: bool = False,
    own_collectives: bool = False,
    carrier: Literal["torch", "horovod"] | None = None,
    grid: bool = False,
) -> int:
    """Run every check; returns how many ran.

    Args:
        max_count: as if MPI's counts ended there.
        own_collectives: through the collectives of torch's backend that NCCL would have for CUDA tensors.
        staged: as if these tensors lay on a device that the transport cannot read.
        carrier: of a HorovodTransport.
        grid: in rows and columns.
    """
    if carrier is not None:
        transport = HorovodTransport(carrier=carrier)
        assert transport.can_split == (carrier != "horovod"), "Horovod's own collectives have no groups"
    if staged:
        carries = transport._inner if isinstance(transport, ForwardingTransport) else transport
        carries.stages = lambda device: True
    if own_collectives:
        transport._host = DeviceCollectives(transport._host._backend)
    if max_count is not None:
        transport._max_count = max_count
    if grid:
        transport = GridTransport(transport)
    checks = [value for name, value in globals().items() if name.startswith("check_") and name != "check_all"]
    for check in checks:
        check(transport)
        transport.barrier()
    return len(checks)


def arrives_by_itself(transport: Any) -> bool:
    """Whether an MPI sum of two ranks comes in while this rank calls nothing. The value is in no fresh memory."""
    start_exchange, shares = transport._start_exchange, []
    transport._start_exchange = lambda outgoing, incoming: shares.extend(incoming) or start_exchange(outgoing, incoming)
    handle = transport.start_reduce_scatter(torch.full((2, 500_000), 12345.0))
    incoming = shares[1 - transport.rank]
    deadline = time.monotonic() + 20
    while incoming[-1] != 12345 and time.monotonic() < deadline:
        time.sleep(0.01)
    arrived = bool(incoming[-1] == 12345)
    handle.wait()
    return arrived


def length_of_a_message_beyond_2_gib(transport: Any) -> int:
    """What MPI's allgather makes of a message of 2^29 float32: that it has arrived is only said."""

    def probe(peer: int, status: Any) -> SimpleNamespace:
        status.Set_elements(transport._mpi.FLOAT, 2**29)
        return SimpleNamespace(Recv=lambda piece: None)

    transport._comm = SimpleNamespace(Mprobe=probe, rank=0, Barrier=transport._comm.Barrier)
    return transport._probe(1, torch.empty(0))[1]


def of_rank(rank: int, *shape: int) -> torch.Tensor:
    """Small integers that differ between ranks and positions, float32."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + rank * 31) % 101 - 50).to(torch.float32).reshape(shape)


def rounding(rank: int, *shape: int) -> torch.Tensor:
    """Numbers of this rank whose sum depends on the order of its terms, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10**rank


def check_rank_and_size(t: Transport) -> None:
    assert 0 <= t.rank < t.size
    assert t.allgather(torch.tensor([t.rank])).tolist() == list(range(t.size))


def check_allreduce(t: Transport) -> None:
    for dtype in SUMMABLE:
        for length in LENGTHS[1:]:
            mine = of_rank(t.rank, length).to(dtype)
            result = t.allreduce_(mine)
            expected = sum(of_rank(r, length).to(dtype) for r in range(t.size))
            assert torch.equal(mine, expected) and torch.equal(result, expected) and mine.dtype == dtype


def check_reduce_scatter(t: Transport) -> None:
    for dtype in (torch.float32, torch.float64):
        for shape in [(n,) for n in LENGTHS] + [(3, 5)]:
            mine = of_rank(t.rank, t.size, *shape).to(dtype)
            before = mine.clone()
            expected = sum(of_rank(r, t.size, *shape)[t.rank] for r in range(t.size)).to(dtype)
            for result in (t.reduce_scatter(mine), t.reduce_scatter(mine, ordered=True)):
                assert result.shape == shape and torch.equal(result, expected)
            assert torch.equal(mine, before), "a reduce_scatter must not change its input"


def check_ordered_sums(t: Transport) -> None:
    parts = [rounding(r, t.size, 1001) for r in range(t.size)]
    expected = parts[0][t.rank].clone()
    for part in parts[1:]:
        expected += part[t.rank]
    assert torch.equal(t.reduce_scatter(parts[t.rank], ordered=True), expected), "the sum must be in rank order"


def check_reduce_scatters_in_flight(t: Transport) -> None:
    for ordered in (False, True):
        mine = [rounding(t.rank, t.size, length) for length in (7, 0, 20_001, 1, 1000)]
        before = [tensor.clone() for tensor in mine]
        expected = [t.reduce_scatter(tensor, ordered) for tensor in mine]
        for gap in (0, 2, 4):
            handles = [t.start_reduce_scatter(tensor, ordered) for tensor in mine]
            for i, (handle, blocking) in enumerate(zip(handles, expected, strict=True)):
                if i == gap:  # other collectives may run while some are in flight
                    check_allreduce(t)
                    assert torch.equal(t.reduce_scatter(mine[2], ordered), expected[2])
                assert torch.equal(handle.wait(), blocking), "starting early must not change a bit"
        assert all(map(torch.equal, mine, before)), "a reduce_scatter must not change its input"


def check_alltoall(t: Transport) -> None:
    for dtype in (torch.float32, torch.int64, torch.uint8):
        for length in LENGTHS:
            mine = of_rank(t.rank, t.size, length).abs().to(dtype)
            expected = torch.stack([of_rank(r, t.size, length)[t.rank].abs().to(dtype) for r in range(t.size)])
            assert torch.equal(t.alltoall(mine), expected)


def check_allgather_of_unequal_parts(t: Transport) -> None:
    for dtype in MOVABLE:
        for length in LENGTHS:
            # Some ranks send nothing, and where length is 0 none does.
            lengths = [(length * ((r + 1) % t.size)) for r in range(t.size)]
            parts = [of_rank(r, n).to(dtype) for r, n in enumerate(lengths)]
            result = t.allgather(parts[t.rank])
            assert result.dtype == dtype and torch.equal(result, torch.cat(parts))
    for columns in (3, 0):
        matrices = [of_rank(r, r + 1, columns) for r in range(t.size)]
        assert torch.equal(t.allgather(matrices[t.rank]), torch.cat(matrices))


def check_broadcast(t: Transport) -> None:
    for root in {0, t.size - 1}:
        for dtype in MOVABLE:
            for shape in [(1,), (7,), (3, 5), ()]:
                tensor = of_rank(t.rank, *shape).to(dtype)
                t.broadcast_(tensor, root)
                assert torch.equal(tensor, of_rank(root, *shape).to(dtype))


def check_large_messages(t: Transport) -> None:
    length = 300_001
    total = t.allreduce_(torch.full((length,), float(t.rank + 1)))
    assert bool((total == t.size * (t.size + 1) / 2).all())
    gathered = t.allgather(torch.full((length,), t.rank, dtype=torch.uint8))
    assert torch.equal(gathered, torch.arange(t.size, dtype=torch.uint8).repeat_interleave(length))
