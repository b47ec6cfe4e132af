"""Local work of every method on this machine, timed for some seconds in place of stored constants."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_sketch.at_ratio import Shapes, configurations, elements_of
from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.config import Compression, SketchConfig
from hvd_sketch.cost import POWERSGD_RANK, TOP_SHARE
from hvd_sketch.exchange.matrices import least_bytes
from hvd_sketch.measured_costs import Work, Works
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import local_transports
from hvd_sketch.wire_bytes import DENSE_BYTES

LARGEST_TIMED = {"cpu": 4_000_000, "cuda": 100_000_000}  # coordinates, by device
LEAST_S = 0.2  # of every measurement
LEAST_REPEATS = 5
MEAN_OF = 2  # ranks, whose mean a dense exchange makes


def check_device(device: str) -> None:
    """Refuse to measure on a GPU that is not there. Raises ValueError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave out --calibrate and --measure, or --device")


def works_here(
    shapes: Shapes, ratio: float, ranks: int, bits: int = 4, device: str = "cpu", can_split: bool = True
) -> Works:
    """By method, on this machine and in as many threads as torch has; of a smaller model where this one is large."""
    whole, largest = elements_of(shapes), LARGEST_TIMED[device]
    timed = shapes if whole <= largest else shapes_of_size(largest)
    dim = elements_of(timed)
    found = {name: Work(1e9 * seconds_of_other(name, timed, device) / dim) for name in OTHERS}
    for name, config in configurations(shapes, ratio, ranks, bits, can_split=can_split).items():
        own = config if timed is shapes else _smaller(config, dim / whole, timed)
        found[name] = Work(1e9 * seconds_of_step(own, timed, device) / dim)
    return found


def _smaller(config: Compression, share: float, shapes: Shapes) -> Compression:
    """Of a model that is a ``share`` as large: with as many coordinates and cells per element.

    It need not have the ratio: what every step takes, whatever the size, leaves a small model less, or nothing.
    """
    if isinstance(config, SketchConfig):
        return replace(config, k=max(round(share * config.k), 1), cols=math.ceil(share * config.cols))
    highest = DENSE_BYTES * elements_of(shapes) / least_bytes(shapes, config.value_bits)
    return config if config.ratio is None else replace(config, ratio=min(config.ratio, highest))


def seconds_of_step(config: Compression, shapes: Shapes, device: str = "cpu") -> float:
    """Of an exchange without a network: the local work of one rank, in as many threads as torch has.

    Communication: none.
    """
    (alone,), dim = local_transports(1), elements_of(shapes)
    exchange = make_exchange(config, dim, alone, torch.device(device), shapes=shapes)
    gradient, own = _gradient(dim, device), torch.empty(dim, dtype=torch.float32, device=device)
    return seconds_of(lambda: exchange.step(own), device, lambda: own.copy_(gradient))


def seconds_of_other(name: str, shapes: Shapes, device: str = "cpu") -> float:
    """Of a method of :data:`OTHERS` without a network, as :func:`seconds_of_step` of ours. Communication: none."""
    return seconds_of(OTHERS[name](_gradient(elements_of(shapes), device), shapes), device)


def _gradient(dim: int, device: str) -> Tensor:
    """Heavy-tailed, as gradients are: float32 [dim]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(dim, dtype=torch.float32, device="cpu", generator=random).pow_(3).to(device)


def waiting_for(device: str) -> Callable[[], None]:
    """What returns when all that was begun on a device is done."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def seconds_of(run: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None) -> float:
    """Median of some calls, the first left out; ``prepare`` comes before each, and is not counted."""
    wait = waiting_for(device)
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


def _dense(gradient: Tensor, shapes: Shapes) -> Callable[[], Tensor]:
    """A sum, and its division by the number of ranks."""
    return lambda: (gradient + gradient).div_(MEAN_OF)


def _bf16(gradient: Tensor, shapes: Shapes) -> Callable[[], Tensor]:
    """The same of half as many bytes, with a cast to and fro."""

    def run() -> Tensor:
        sent = gradient.bfloat16()
        return (sent + sent).float().div_(MEAN_OF)

    return run


def _top_k(gradient: Tensor, shapes: Shapes) -> Callable[[], Tensor]:
    """With error feedback: what is chosen leaves the residual, and what all ranks chose is added up."""

    def run() -> Tensor:
        residual = gradient + gradient
        chosen = residual.abs().topk(max(round(TOP_SHARE * len(gradient)), 1)).indices
        values = residual[chosen]
        residual[chosen] = 0
        return torch.zeros_like(gradient).index_add_(0, chosen, values)

    return run


def _powersgd(gradient: Tensor, shapes: Shapes) -> Callable[[], Tensor]:
    """torch's own hook, on one rank and from its first compressed step on."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    group: Any = _Alone
    state = PowerSGDState(group(0, 1), matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)
    state.iter = state.start_powerSGD_iter

    def run() -> Tensor:
        flat = gradient.clone()
        pieces = flat.split([math.prod(shape) for shape in shapes])
        parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        kept = {"buffer": lambda: flat, "gradients": lambda: parts, "index": lambda: 0, "is_last": lambda: True}
        bucket: Any = SimpleNamespace(**kept)
        return powerSGD_hook(state, bucket).wait()

    return run


class _Alone(dist.ProcessGroup):
    """The process group of one rank, whose sums are done at once."""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:  # type: ignore[override]
        summed: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        summed.set_result(tensors)
        return torch._C._distributed_c10d._create_work_from_future(summed)  # type: ignore[attr-defined]


OTHERS: Mapping[str, Callable[[Tensor, Shapes], Callable[[], Tensor]]] = {
    "dense": _dense,
    "bf16": _bf16,
    "topk": _top_k,
    "powersgd": _powersgd,
}
