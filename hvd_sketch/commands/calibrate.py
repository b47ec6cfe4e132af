"""Local work of every method on this machine, timed for some seconds in place of stored constants."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.config import Compression, LowRankConfig
from hvd_sketch.cost import POWERSGD_RANK, TOP_SHARE, Shapes, configurations
from hvd_sketch.exchange.matrices import as_matrices
from hvd_sketch.measured_costs import Work, Works
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import local_transports

LARGEST_TIMED = {"cpu": 4_000_000, "cuda": 100_000_000}  # coordinates, by device
LEAST_S = 0.2  # of every measurement
LEAST_REPEATS = 5
MEAN_OF = 2  # ranks, whose mean a dense exchange makes


def works_here(shapes: Shapes, ratio: float, ranks: int, bits: int = 4, device: str = "cpu") -> Works:
    """By method, on this machine and in as many threads as torch has; of a smaller model where this one is large.

    Raises:
        ValueError: there is no such device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--calibrate --device {device}: torch sees no GPU here; leave out --calibrate or --device")
    largest = LARGEST_TIMED[device]
    if sum(map(math.prod, shapes)) > largest:
        shapes = shapes_of_size(largest)
    dim = sum(map(math.prod, shapes))
    seconds = {name: partial(run, _gradient(dim, device), shapes) for name, run in OTHERS.items()}
    found = {name: Work(1e9 * seconds_of(run, device) / dim) for name, run in seconds.items()}
    for name, config in configurations(shapes, ratio, ranks, bits).items():
        found[name] = Work(1e9 * seconds_of_step(config, shapes, device) / dim)
    return found


def seconds_of_step(config: Compression, shapes: Shapes, device: str = "cpu") -> float:
    """Of an exchange without a network: the local work of one rank, in as many threads as torch has.

    Communication: none.
    """
    (alone,), dim = local_transports(1), sum(map(math.prod, shapes))
    exchange = make_exchange(config, dim, alone, torch.device(device), shapes=shapes)
    gradient, own = _gradient(dim, device), torch.empty(dim, device=device)
    return seconds_of(lambda: exchange.step(own), device, lambda: own.copy_(gradient))


def _gradient(dim: int, device: str) -> Tensor:
    """Heavy-tailed, as gradients are: float32 [dim]."""
    return torch.randn(dim, generator=torch.Generator().manual_seed(0)).pow_(3).to(device)


def seconds_of(run: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None) -> float:
    """Median of some calls, the first left out; ``prepare`` comes before each, and is not counted."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    spent: list[float] = []
    prepare()
    run()
    while sum(spent) < LEAST_S or len(spent) < LEAST_REPEATS:
        prepare()
        wait()
        start = time.perf_counter()
        run()
        wait()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _dense(gradient: Tensor, shapes: Shapes) -> Tensor:
    """A sum, and its division by the number of ranks."""
    return (gradient + gradient).div_(MEAN_OF)


def _bf16(gradient: Tensor, shapes: Shapes) -> Tensor:
    """The same of half as many bytes, with a cast to and fro."""
    sent = gradient.bfloat16()
    return (sent + sent).float().div_(MEAN_OF)


def _top_k(gradient: Tensor, shapes: Shapes) -> Tensor:
    """With error feedback: what is chosen leaves the residual, and what all ranks chose is added up."""
    residual = gradient + gradient
    chosen = residual.abs().topk(max(round(TOP_SHARE * len(gradient)), 1)).indices
    values = residual[chosen]
    residual[chosen] = 0
    return torch.zeros_like(gradient).index_add_(0, chosen, values)


def _powersgd(gradient: Tensor, shapes: Shapes) -> Tensor:
    """With error feedback: two products and an orthogonalisation of every matrix, and their product's difference."""
    residual = gradient + gradient
    for matrix in as_matrices(shapes, LowRankConfig(rank=POWERSGD_RANK)):
        right = residual.new_ones(matrix.rank, matrix.cols)
        left = residual.new_empty(matrix.rank, matrix.rows)
        matrix.times_right_(left, residual, right)
        left = torch.linalg.qr(left.t()).Q.t().contiguous()
        matrix.times_left_(right, residual, left)
        matrix.subtract_product_(residual, left, right)
    return gradient - residual


OTHERS: Mapping[str, Callable[[Tensor, Shapes], Tensor]] = {
    "dense": _dense,
    "bf16": _bf16,
    "topk": _top_k,
    "powersgd": _powersgd,
}
