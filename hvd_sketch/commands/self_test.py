"""What every rank of ``hvd-sketch doctor``'s jobs runs: some steps, of which nothing is lost and all ranks agree."""

from __future__ import annotations

import sys

import torch

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.transport import resolve_transport

DIM, STEPS = 10_000, 20
CLOSE = 1e-4


def main(transport_name: str, ranks: int) -> None:
    """Raises RuntimeError where something is wrong. Communication: collective, all ranks."""
    transport = resolve_transport(transport_name)
    if transport.size != ranks:
        raise RuntimeError(
            f"expected {ranks} ranks, rank {transport.rank} finds {transport.size}: launcher and library do not fit"
        )
    exchange = SketchedAllreduce(SketchConfig.for_wire_ratio(20, DIM, transport.size), DIM, transport)
    random = torch.Generator().manual_seed(transport.rank)
    produced, sent = torch.zeros(DIM, device="cpu"), torch.zeros(DIM, device="cpu")
    for _ in range(STEPS):
        gradient = torch.randn(DIM, generator=random, device="cpu")
        produced += gradient
        update = exchange.step(gradient)
        sent[update.indices] += update.values
    left = transport.allreduce_(produced - exchange.residual) / transport.size
    equal = torch.equal(transport.broadcast_(sent.clone()), sent)
    lost = float((left - sent).abs().max())
    if not equal or lost > CLOSE:
        raise RuntimeError(f"rank {transport.rank}: updates are {'' if equal else 'not '}equal, {lost:.2g} was lost")
    print(f"rank {transport.rank} of {transport.size}: ok")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
