"""Digests of updates, residuals and bytes over 12 steps, by which a change of structure is seen to change nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.transport import Transport

SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (785, {"rows": 7, "cols": 40, "k": 10, "oversample": 10, "momentum": 0.9}),
    (20_011, {"rows": 3, "cols": 900, "k": 97, "oversample": 4, "momentum": 0.0}),
    (200_003, {"rows": 5, "cols": 4_000, "k": 1_500, "oversample": 4, "momentum": 0.9}),
    (20_011, {"rows": 3, "cols": 900, "k": 97, "oversample": 4, "momentum": 0.0, "candidates": "heavymix"}),
]
STEPS, SKIPPED_STEP = 12, 5


def digests(transport: Transport) -> list[tuple[str, str, int]]:
    """For each setting: of the updates, equal on all ranks; also of this rank's residual; and the payload's bytes."""
    return [digest(transport, dim, options) for dim, options in SETTINGS]


def digest(transport: Transport, dim: int, options: dict[str, Any]) -> tuple[str, str, int]:
    exchange = SketchedAllreduce(SketchConfig.paper(**options, deterministic=True, seed=7), dim, transport)
    seen = hashlib.sha256()
    generator = torch.Generator().manual_seed(1000 + transport.rank)
    for step in range(STEPS):
        gradient = torch.randn(dim, generator=generator) * torch.rand(dim, generator=generator).pow(3)
        if step == SKIPPED_STEP and transport.rank == transport.size - 1:
            gradient[3] = float("nan")
        update = exchange.step(gradient)
        assert update.skipped == (step == SKIPPED_STEP)
        for tensor in (update.indices, update.values):
            seen.update(tensor.contiguous().numpy().tobytes())
    of_updates = seen.hexdigest()
    seen.update(exchange.residual.numpy().tobytes())
    return of_updates, seen.hexdigest(), exchange.ledger.totals().payload_bytes
