"""What bandwidth.py runs on every host: check each method, then time its exchange at each rate of the network."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hvd_sketch.transport import Transport, resolve_transport
from versus.checks import check
from versus.clock import ClockedTransport, over_hosts, quantiles, read_sent, slowest
from versus.lab import UNSHAPED, shape_together
from versus.methods import METHODS, Gradient, Method
from versus.records import Record, Records

LEAST_REPEATS, SPLIT_REPEATS = 2, 2
COLUMNS = MOST_ROWS = 1000  # of the matrices the gradient is made of, as PowerSGD sees it


@dataclass
class Settings:
    """What to measure; see bandwidth.py. ``pending``: (method, dim, rates) that have no record yet."""

    lab: str
    hosts: int
    pending: list[tuple[str, int, list[str]]]
    repeats: int
    budget_s: float
    records: str


def main(transport_name: str, settings: Settings) -> None:
    torch.set_num_threads(1)  # Horovod's launcher does not tell torch
    inner = resolve_transport(transport_name)
    records = Records(Path(settings.records))
    inputs: tuple[int, Gradient, Gradient] | None = None
    for name, dim, rates in settings.pending:
        if inputs is None or inputs[0] != dim:
            inputs = dim, make_gradient(dim, inner.rank, 0), make_gradient(dim, inner.rank, 1)
        clocked = ClockedTransport(inner)
        method = METHODS[name](clocked, dim)
        make = partial(copy_of, scratch=make_gradient(dim, 0, None), inputs=inputs[1:])
        shape_together(inner, settings.lab, UNSHAPED)
        check(method, inner, make)
        for rate in rates:
            shape_together(inner, settings.lab, rate)
            measured = Exchanges(method, clocked, inner, make).measure(settings.repeats, settings.budget_s)
            if inner.rank == 0:
                about = {"method": name, "transport": transport_name, "dim": dim, "hosts": settings.hosts, "rate": rate}
                records.append(about | measured)
                print(describe(about | measured), flush=True)
            inner.barrier()
        del method, make


def make_gradient(dim: int, rank: int, step: int | None) -> Gradient:
    """Heavy-tailed as gradients are (a normal variable's cube), different on each rank and step; None: empty."""
    flat = torch.empty(dim)
    if step is not None:
        flat.normal_(generator=torch.Generator().manual_seed(1000 * step + rank)).pow_(3)
    return Gradient.over(flat, matrices(dim))


def matrices(dim: int) -> list[tuple[int, int]]:
    """Shapes of so many elements in all."""
    columns = COLUMNS if dim % COLUMNS == 0 else 1
    rows = dim // columns
    whole, rest = divmod(rows, MOST_ROWS)
    return [(MOST_ROWS, columns)] * whole + [(rest, columns)] * (rest > 0)


def copy_of(step: int, scratch: Gradient, inputs: tuple[Gradient, ...]) -> Gradient:
    """A gradient that a method may overwrite."""
    scratch.flat.copy_(inputs[step % len(inputs)].flat)
    return scratch


class Exchanges:
    """Times exchanges of one method at one rate. Every measurement is collective."""

    def __init__(self, method: Method, clocked: ClockedTransport, inner: Transport, make) -> None:
        self._method, self._clocked, self._inner, self._make = method, clocked, inner, make
        self._done = 0

    def measure(self, repeats: int, budget_s: float) -> Record:
        """As many exchanges as fit into the budget, after one to warm up: seconds are the slowest rank's each."""
        warm_up_s = self._time_one()
        repeats = min(repeats, max(LEAST_REPEATS, int(budget_s / max(warm_up_s, 1e-6))))
        wire_before, sent_before = self._method.ledger.totals().wire_bytes, read_sent()
        seconds = [self._time_one() for _ in range(repeats)]
        sent = (read_sent() - sent_before) // repeats
        wire_bytes = (self._method.ledger.totals().wire_bytes - wire_before) // repeats
        compute_s, network_s = self._split(min(repeats, SPLIT_REPEATS))
        return {
            "seconds": quantiles(seconds) | {"repeats": repeats},
            "compute_s": round(compute_s, 5),
            "network_s": round(network_s, 5),
            "ledger_wire_bytes": wire_bytes,
            "interface": over_hosts(self._inner, sent),
            "ratio": round(self._method.ledger.compression_ratio(), 2),
        }

    def _time_one(self) -> float:
        gradient = self._make(self._done)
        self._done += 1
        self._inner.barrier()
        start_s = time.perf_counter()
        self._method.average(gradient)
        return slowest(self._inner, time.perf_counter() - start_s)[0]

    def _split(self, repeats: int) -> tuple[float, float]:
        """Means of what the slowest rank computes, and of what it spends in collectives, with nothing overlapped."""
        self._clocked.splits, self._clocked.network_s = True, 0.0
        total_s = sum(self._time_one() for _ in range(repeats)) / repeats
        self._clocked.splits = False
        network_s = slowest(self._inner, self._clocked.network_s / repeats)[0]
        return total_s - network_s, network_s


def describe(record: Record) -> str:
    seconds = record["seconds"]
    return (
        f"{record['method']:9} {record['transport']:7} dim {record['dim']:>11,} on {record['hosts']} hosts at "
        f"{record['rate']:>8}: {seconds['median']:8.4f} s ({seconds['q10']:.4f} to {seconds['q90']:.4f}, "
        f"{seconds['repeats']} times), compute {record['compute_s']:.4f}, network {record['network_s']:.4f}, "
        f"{record['interface']['mean_bytes']:>12,} bytes"
    )


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))
