"""Times and bytes of collective operations: a clock on the network, and the kernel's counters of an interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from hvd_sketch.transport import Handle, Transport
from hvd_sketch.transport.forwarding import ForwardingTransport

INTERFACE = "eth0"
HEADER_BYTES = 14 + 20 + 32  # of each packet: Ethernet, IPv4, and TCP with its timestamps
T = TypeVar("T")


class ClockedTransport(ForwardingTransport):
    """A transport that can split time: what its collectives take goes into ``network_s``.

    While ``splits``, nothing is computed while anything travels, and every collective (of several started together
    the first) begins with a barrier, whose time goes into ``waiting_s``: waiting for a rank that still computes does
    not count as network. Otherwise all passes through untouched.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.splits = False
        self.network_s = self.waiting_s = 0.0
        self._in_flight = 0

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps and not self.splits

    def allreduce_(self, tensor: Tensor) -> Tensor:
        return self._clock(lambda: self._inner.allreduce_(tensor))

    def reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Tensor:
        return self._clock(lambda: self._inner.reduce_scatter(tensor, ordered))

    def start_reduce_scatter(self, tensor: Tensor, ordered: bool = False) -> Handle:
        if not self.splits:
            return self._inner.start_reduce_scatter(tensor, ordered)
        handle = self._clock(lambda: self._inner.start_reduce_scatter(tensor, ordered), meet=not self._in_flight)
        self._in_flight += 1
        return SimpleNamespace(wait=partial(self._finish, handle))

    def alltoall(self, tensor: Tensor) -> Tensor:
        return self._clock(lambda: self._inner.alltoall(tensor))

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._clock(lambda: self._inner.allgather(tensor))

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self._clock(lambda: self._inner.broadcast_(tensor, root))

    def _finish(self, handle: Handle) -> Tensor:
        self._in_flight -= 1
        return self._clock(handle.wait, meet=False)

    def _clock(self, collective: Callable[[], T], meet: bool = True) -> T:
        if not self.splits:
            return collective()
        arrived_s = time.perf_counter()
        if meet:
            self._inner.barrier()
        start_s = time.perf_counter()
        result = collective()
        self.network_s += time.perf_counter() - start_s
        self.waiting_s += start_s - arrived_s
        return result


def read_sent() -> Tensor:
    """Bytes and packets this host's interface has sent, as the kernel counts them: int64 [2]."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return torch.tensor([int(counts[8]), int(counts[9])])


def over_hosts(transport: Transport, sent: Tensor) -> dict[str, int]:
    """Of what :func:`read_sent` counted on each host: mean and largest, headers included. Collective."""
    every = transport.allgather(sent.unsqueeze(0)).to(torch.float64)
    return {
        "mean_bytes": round(float(every[:, 0].mean())),
        "most_bytes": round(float(every[:, 0].max())),
        "header_bytes": round(float(every[:, 1].mean()) * HEADER_BYTES),
    }


def slowest(transport: Transport, *numbers: float) -> list[float]:
    """The largest over ranks of each. Collective."""
    return transport.allgather(torch.tensor([numbers], dtype=torch.float64)).max(0).values.tolist()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, and the values below which a tenth and nine tenths lie."""
    marks = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    return dict(zip(("median", "q10", "q90"), [round(mark, 5) for mark in marks.tolist()], strict=True))
