"""Positions coded on the device against copying them to the host and coding them there: from which number on it pays.

``python -m benchmarks.gpu.coding OUT``. A round trip makes the code of this rank's positions, in host memory for the
network, and the union of the codes of four ranks, on the device. Exits with 1 where the two differ.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu.record import add, asked
from benchmarks.kernels.measure import time_ms
from hvd_sketch.coding import device as on_device
from hvd_sketch.coding import host as on_host
from hvd_sketch.transport.staging import to_host

RANKS, ROUNDS = 4, 7


def round_trip(coding: ModuleType, positions: list[Tensor], span: int) -> tuple[Tensor, Tensor]:
    """The code of the first rank's positions, and the union of all ranks'."""
    own, *others = positions
    source = to_host(own) if coding is on_host else own
    code = coding.encode_positions(source, span)
    codes = torch.cat([code, *(on_host.encode_positions(other.cpu(), span) for other in others)])
    return code, coding.decode_union(codes, span, own.device)


def measure(count: int, span: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the parts, medians."""
    draw = torch.Generator().manual_seed(count)
    positions = [torch.randint(span, (count,), generator=draw).unique().to(device) for _ in range(RANKS)]
    (code, union), (expected_code, expected) = (round_trip(c, positions, span) for c in (on_device, on_host))
    if not torch.equal(code, expected_code) or not torch.equal(union, expected):
        sys.exit(f"{count} positions: the device's code or union differs from the host's")
    codes = torch.cat([on_host.encode_positions(other.cpu(), span) for other in positions])
    operations = {
        "encode, device": lambda: on_device.encode_positions(positions[0], span),
        "encode, host": lambda: on_host.encode_positions(to_host(positions[0]), span),
        "decode, device": lambda: on_device.decode_union(codes, span, device),
        "decode, host": lambda: on_host.decode_union(codes, span, device),
    }
    times = time_ms(operations, ROUNDS, device)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    out, is_rehearsal = asked()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = [300] if is_rehearsal else [1_000, 10_000, 100_000, 1_000_000, 4_000_000]
    span = 10_000 if is_rehearsal else 100_000_000
    rows = []
    for count in counts:
        rows.append({"count": count, **measure(count, span, device)})
        print(rows[-1], flush=True)
        add(out, "coding", span=span, ranks=RANKS, rows=rows)


if __name__ == "__main__":
    main()
