"""What the ranks of test_wire.py run: exchanges in which every phase is weighed by the host's interface."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hvd_sketch import DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.transport import Transport
from hvd_sketch.transport.grid import GridTransport
from hvd_sketch.transport.metered import MeteredTransport
from tests.support.targets import float_gradient

IDLE_S = 1.0  # 50 of Horovod's cycles, which test_wire.py sets to 20 ms


def read_sent() -> tuple[int, int]:
    """Bytes and packets this host's eth0 has sent, as the kernel counts them."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:"))
    return int(counts[8]), int(counts[9])


class Scales:
    """Weighs what this host sends while something happens on all ranks: {name: [bytes, packets, seconds]}."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.weighed: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])

    @contextmanager
    def weigh(self, name: str) -> Iterator[None]:
        # After the first barrier no earlier message is still to be sent; before the second all of ours have arrived.
        self._transport.barrier()
        start = (*read_sent(), time.monotonic())
        yield
        self._transport.barrier()
        end = (*read_sent(), time.monotonic())
        total = self.weighed[name]
        self.weighed[name] = [t + after - before for t, after, before in zip(total, end, start, strict=True)]

    @contextmanager
    def weigh_phases(self, prefix: str) -> Iterator[None]:
        """Weigh every phase of every exchange inside."""
        original = MeteredTransport.phase
        scales = self

        @contextmanager
        def weighed_phase(metered: MeteredTransport, name: str, *where: torch.device) -> Iterator[None]:
            with scales.weigh(f"{prefix} {name}"), original(metered, name, *where):
                yield

        MeteredTransport.phase = weighed_phase  # type: ignore[method-assign]
        try:
            yield
        finally:
            MeteredTransport.phase = original  # type: ignore[method-assign]


def weigh_exchanges(
    transport: Transport, dim: int, config: dict[str, Any], steps: dict[str, int], grid: bool = False
) -> dict[str, Any]:
    """Sketched, deterministic ("ordered") and dense exchanges: what each phase sent, and what the ledger says of it.

    Args:
        grid: as many ranks exchange.
    """
    carrier = type(getattr(transport, "_inner", transport)).__name__
    if grid:
        transport = GridTransport(transport)
    scales = Scales(transport)
    with scales.weigh("idle"):
        time.sleep(IDLE_S)
    exchanges = {
        "sketched": SketchedAllreduce(SketchConfig.paper(**config), dim, transport),
        "ordered": SketchedAllreduce(SketchConfig.paper(**config, deterministic=True), dim, transport),
        "dense": DenseAllreduce(None, dim, transport),
    }
    modelled: dict[str, int] = defaultdict(int)
    for name, exchange in exchanges.items():
        with scales.weigh_phases(name):
            for step in range(steps[name]):
                exchange.step(float_gradient(dim, transport.rank, step))
        for phase, totals in exchange.ledger.by_phase().items():
            modelled[f"{name} {phase}"] += totals.wire_bytes
    return {"size": transport.size, "carrier": carrier, "weighed": dict(scales.weighed), "modelled": dict(modelled)}
