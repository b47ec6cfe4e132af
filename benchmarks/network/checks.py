"""Is it right? Asked before anything is timed.

Every method must satisfy one identity, checked on a random projection that sees every coordinate: what all ranks
produced is what was sent plus what they keep. What else a method promises is checked beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods.allreduce import HalfPrecision
from benchmarks.methods.top_k import LocalTopK
from hvd_sketch import SketchedAllreduce
from hvd_sketch.exchange.base import Exchange, SparseUpdate
from hvd_sketch.exchange.residual import ResidualExchange
from hvd_sketch.transport import Transport

# Of the length of the vector. Rounding alone makes 5e-4 in half precision with 4 ranks (one standard deviation).
FLOAT32_SLACK, FLOAT16_SLACK = 2e-6, 5e-3
CHUNK = 1 << 20


class WrongResult(Exception):
    """A method's result is not what it promises; the same on all ranks."""


def check(method: Exchange, transport: Transport, make: Callable[[int], Tensor]) -> None:
    """Run a method for two steps on ``make(0)`` and ``make(1)``: from nothing kept, and with what it kept then.

    Raises:
        WrongResult: on all ranks, with what is wrong and on which.

    Communication: collective.
    """
    for step in range(2):
        produced = (make(step) + method.residual).cpu()
        update, kept = _on_host(method.step(make(step))), method.residual.cpu()
        wrong = _nothing_lost(method, transport, produced, update, kept)
        if isinstance(method, ResidualExchange):
            wrong += _same_bits(transport, update)
        if isinstance(method, SketchedAllreduce) and method.config.value_bits == 32:
            wrong += _exact_at_indices(transport, produced, update)
        if isinstance(method, LocalTopK):
            wrong += _largest(method.config.k, produced, kept)
        _raise_together(transport, wrong, step)


def _on_host(update: SparseUpdate) -> SparseUpdate:
    return SparseUpdate(None if update.indices is None else update.indices.cpu(), update.values.cpu(), update.skipped)


def _nothing_lost(
    method: Exchange, transport: Transport, produced: Tensor, update: SparseUpdate, kept: Tensor
) -> list[str]:
    own = [project(produced), project(kept), float(produced.norm()) ** 2]
    made, stays, square = transport.allgather(torch.tensor([own], dtype=torch.float64)).sum(0).tolist()
    everywhere = update.values
    if everywhere.numel() < method.dim:
        everywhere = torch.zeros(method.dim).index_copy_(0, update.indices, update.values)
    sent = project(everywhere) * transport.size
    slack = FLOAT16_SLACK if isinstance(method, HalfPrecision) else FLOAT32_SLACK
    if abs(sent + stays - made) <= slack * square**0.5:
        return []
    return [f"sent {sent} and kept {stays} do not add up to what was produced, {made} (along a random direction)"]


def project(vector: Tensor) -> float:
    """The product of a float32 [n] vector with one random vector that all ranks share, in float64."""
    return sum(float(chunk.double() @ _direction(i, len(chunk))) for i, chunk in enumerate(vector.split(CHUNK)))


def _direction(chunk: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(chunk)
    return torch.randn(CHUNK, generator=generator, dtype=torch.float64)[:length]


def _exact_at_indices(transport: Transport, produced: Tensor, update: SparseUpdate) -> list[str]:
    """Values are the mean over ranks of all that was produced at the indices."""
    every = transport.allgather(produced[update.indices].unsqueeze(0))
    mean = every.numpy().astype(np.float64).mean(0)
    if update.indices.numel() and np.allclose(update.values.numpy(), mean, rtol=1e-5, atol=1e-6):
        return []
    return [f"{update.indices.numel()} values differ from the mean of what was produced there"]


def _largest(k: int, produced: Tensor, residual: Tensor) -> list[str]:
    """What a rank sent, and does not keep, are its k largest, by NumPy."""
    sent = np.flatnonzero(produced.numpy() != residual.numpy())
    magnitudes = np.abs(produced.numpy())
    least = np.partition(magnitudes, -k)[-k]
    return [] if len(sent) == k and magnitudes[sent].min() >= least else [f"{len(sent)} sent, not the {k} largest"]


def _same_bits(transport: Transport, update: SparseUpdate) -> list[str]:
    tensors = [tensor for tensor in (update.indices, update.values) if tensor is not None]
    own = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).digest()
    every = transport.allgather(torch.tensor([list(own)], dtype=torch.uint8))
    return [] if bool((every == every[0]).all()) else ["the ranks do not have the same bits"]


def _raise_together(transport: Transport, wrong: list[str], step: int) -> None:
    verdicts = transport.allgather(torch.tensor([len(wrong)])).tolist()
    if any(verdicts):
        bad_ranks = [rank for rank, faults in enumerate(verdicts) if faults]
        raise WrongResult(f"step {step}, ranks {bad_ranks}: {'; '.join(wrong) or 'wrong there, right here'}")
