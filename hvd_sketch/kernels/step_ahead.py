"""Where Adam will come to by gradients that have not arrived yet."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.kernels import _cpu_lag_adam as loops
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.threads import run_on_threads


class Move(NamedTuple):
    """The numbers of a move."""

    scale: float  # of the gradient that will arrive, in times of what is left
    root: float | Tensor  # 1 / root of the bias correction of the second moment; a tensor where the step is on a GPU
    eps: float
    most: float  # rates that a coordinate moves at most
    rate: float  # negative: against the descent


def step_ahead_(parameter: Tensor, left: Tensor, exp_avg_sq: Tensor, kept: Tensor, move: Move) -> None:
    """Keep the parameter, and move it by what Adam will make of a gradient now and, by its momentum, later::

        kept <- w,   w <- w - rate * clamp(scale * left / (sqrt(exp_avg_sq) * root + eps), -most, most)

    A coordinate of which nothing has arrived yet, or whose ``left`` is NaN, stays.

    Args:
        parameter: of any real dtype; changed.
        left: float32 of its shape, what has not arrived.
        exp_avg_sq: of its shape and dtype, Adam's second moment.
        kept: of its shape and dtype; overwritten.
        move: the numbers.

    Communication: none.
    """
    tensors = parameter, left, exp_avg_sq, kept
    is_plain = all(t.is_contiguous() and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    if not is_plain:
        by_torch_(parameter, left, exp_avg_sq, kept, move)
        return
    torch.autograd.graph.increment_version(parameter)  # the kernel writes behind torch's back
    arrays = [tensor.detach().view(-1).numpy() for tensor in tensors]
    numbers = tuple(np.float32(float(number)) for number in move)
    run_on_threads(cpu.threads_for(parameter.numel()), loops.step_ahead, *arrays, numbers)


def by_torch_(parameter: Tensor, left: Tensor, exp_avg_sq: Tensor, kept: Tensor, move: Move) -> None:
    """The reference of :func:`step_ahead_`, on any device."""
    kept.copy_(parameter)
    deviation = exp_avg_sq.sqrt().mul_(move.root).add_(move.eps)
    steps = (left * move.scale / deviation).clamp_(-move.most, move.most).nan_to_num_(0.0)
    parameter.sub_(steps.masked_fill_(exp_avg_sq == 0, 0.0).mul_(move.rate))


def warm_up() -> None:
    """Compile the kernel for CPUs where Numba's cache does not hold it. Communication: none."""
    ones = partial(torch.ones, 1, dtype=torch.float32, device="cpu")
    step_ahead_(ones(), ones(), ones(), ones(), Move(1.0, 1.0, 1e-8, 1.0, 1.0))
