"""What bandwidth.py runs on every host: check each method, then time its exchange at each rate of the network."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.methods import FEW_BIT_RATIO, METHODS
from benchmarks.network.checks import check
from benchmarks.network.clock import ClockedTransport, over_hosts, quantiles, read_sent, slowest
from benchmarks.network.lab import UNSHAPED, shape_together, transport_on_host
from benchmarks.network.plan_check import PLANNED
from benchmarks.network.records import Record, Records, environment
from hvd_sketch.at_ratio import configurations
from hvd_sketch.commands.calibrate import OTHERS, seconds_of_other, seconds_of_step
from hvd_sketch.commands.measure import probed
from hvd_sketch.exchange.base import Exchange, Parameters
from hvd_sketch.transport import Transport

Pending = tuple[str, int, list[str]]  # method, dim, and the rates of the network
LEAST_REPEATS = 2
MOST_SPLITS = 3  # splitting time takes exchanges of its own
COLUMNS = MOST_ROWS = 1000  # of the matrices the gradient is made of, as PowerSGD sees it


def main(
    transport_name: str, lab: str, hosts: int, pending: list[Pending], repeats: int, budget_s: float, records: str
) -> None:
    """What is ``pending`` has no record yet; see bandwidth.py."""
    torch.set_num_threads(1)  # Horovod's launcher does not tell torch
    transport = transport_on_host(transport_name)
    kept = Records(Path(records))
    for name, dim, rates in pending:
        inputs = Inputs(dim, transport.rank)
        clocked = ClockedTransport(transport)
        method = METHODS[name](clocked, dim, matrices(dim))
        shape_together(transport, lab, UNSHAPED)
        check(method, transport, inputs)
        exchanges = Exchanges(method, clocked, transport, inputs)
        exchanges.split()  # compiles what only it takes
        probe = probe_of(name, transport, matrices(dim))
        for rate in rates:
            shape_together(transport, lab, rate)
            about = {"method": name, "transport": transport_name, "dim": dim, "hosts": hosts, "rate": rate}
            measured = exchanges.measure(repeats, budget_s) | {"probe": probe}
            if transport.rank == 0:
                kept.append(about | measured | environment())
                print(about | measured, flush=True)


def probe_of(name: str, transport: Transport, parameters: Parameters) -> Record:
    """What ``hvd-sketch plan --measure`` measures of this job, for plan_check.py. Communication: collective."""
    probe, method = probed(transport), PLANNED.get(name)
    shapes = [shape for _, shape, _ in parameters]
    if method in OTHERS:
        local_s = slowest(transport, seconds_of_other(method, shapes))[0]
    else:
        config = configurations(shapes, FEW_BIT_RATIO, transport.size).get(method) if method else None
        local_s = None if config is None else slowest(transport, seconds_of_step(config, shapes))[0]
    return {"collective_s": probe.collective_s, "bytes_per_s": probe.bytes_per_s, "local_s": local_s}


@lru_cache(maxsize=1)
class Inputs:
    """Two gradients, heavy-tailed as gradients are (a normal variable's cube) and different on each rank, in turn."""

    def __init__(self, dim: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        self._vectors = torch.randn(2, dim, generator=generator).pow_(3)
        self._scratch = torch.empty(dim)

    def __call__(self, step: int) -> Tensor:
        """This step's, to be overwritten at will."""
        return self._scratch.copy_(self._vectors[step % 2])


def matrices(dim: int) -> Parameters:
    """What a gradient of so many elements is made of."""
    columns = COLUMNS if dim % COLUMNS == 0 else 1
    whole, rest = divmod(dim // columns, MOST_ROWS)
    rows = [MOST_ROWS] * whole + [rest] * (rest > 0)
    return [(f"matrix {number}", (count, columns), "float32") for number, count in enumerate(rows)]


class Exchanges:
    """Times exchanges of one method at one rate. Every measurement is collective."""

    def __init__(
        self, method: Exchange, clocked: ClockedTransport, transport: Transport, inputs: Callable[[int], Tensor]
    ) -> None:
        self._method, self._clocked, self._transport, self._inputs = method, clocked, transport, inputs
        self._done = 0

    def measure(self, repeats: int, budget_s: float) -> Record:
        """As many exchanges as fit into the budget, after some to warm up: seconds are the slowest rank's each.

        What is predicted from steps before, as where the largest coordinates begin, is there after three of them.
        """
        warm_up_s = self._time_one()
        if warm_up_s < budget_s:
            warm_up_s = min(self._time_one() for _ in range(2))
        repeats = min(repeats, max(LEAST_REPEATS, int(budget_s / max(warm_up_s, 1e-6))))
        wire_before, sent_before = self._method.ledger.totals().wire_bytes, read_sent()
        seconds = [self._time_one() for _ in range(repeats)]
        sent = (read_sent() - sent_before) // repeats
        wire_bytes = (self._method.ledger.totals().wire_bytes - wire_before) // repeats
        splits = zip(*(self.split() for _ in range(min(repeats, MOST_SPLITS))), strict=True)
        compute_s, network_s = (statistics.median(each) for each in splits)
        return {
            "seconds": quantiles(seconds) | {"repeats": repeats},
            "compute_s": round(compute_s, 5),
            "network_s": round(network_s, 5),
            "ledger_wire_bytes": wire_bytes,
            "interface": over_hosts(self._transport, sent),
            "ratio": round(self._method.ledger.compression_ratio(), 2),
        }

    def _time_one(self) -> float:
        """Seconds of one exchange on the slowest rank."""
        return slowest(self._transport, self._time_own())[0]

    def _time_own(self) -> float:
        gradient = self._inputs(self._done)
        self._done += 1
        self._transport.barrier()
        start_s = time.perf_counter()
        self._method.step(gradient)
        return time.perf_counter() - start_s

    def split(self) -> tuple[float, float]:
        """What the slowest rank computes in an exchange, and what it spends in collectives, with nothing overlapped."""
        clocked = self._clocked
        clocked.splits, clocked.network_s, clocked.waiting_s = True, 0.0, 0.0
        own_s = self._time_own()
        clocked.splits = False
        compute_s, network_s = own_s - clocked.network_s - clocked.waiting_s, clocked.network_s
        return tuple(slowest(self._transport, compute_s, network_s))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
