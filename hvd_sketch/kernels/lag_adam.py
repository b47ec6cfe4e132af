"""One step of Adam for coordinates whose gradients arrive late, as the sum of the steps that they waited.

On CPUs and GPUs every bit is that of the reference, :func:`by_torch_`.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import ceil_div
from hvd_sketch.kernels import _cpu_lag_adam as loops
from hvd_sketch.kernels import cpu
from hvd_sketch.kernels.threads import run_on_threads

# A moment below this becomes 0: it moves nothing, and subnormal numbers, to which it would decay and stay, are slow.
LEAST_MOMENT = 1e-30
LEAST_WEIGHT_BITS = 25  # a weight of the past below 2^-25 is 0


class Settings(NamedTuple):
    """The numbers of one step."""

    step: int  # from 1
    rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False

    def scalars(self) -> list[float]:
        """What the kernels multiply by, see :func:`by_torch_`."""
        root = 1 / math.sqrt(1 - self.beta2**self.step)
        sign = -1.0 if self.maximize else 1.0
        decay, rate = 1 - self.rate * self.weight_decay, self.rate / (1 - self.beta1**self.step)
        return [LEAST_MOMENT, self.beta1, 1 - self.beta1, sign, root, self.eps, decay, rate]


class State(NamedTuple):
    """Of one parameter, each of its shape.

    ``exp_avg`` is the moving average of what arrived, normalised; ``exp_avg_sq`` that of its squares per step, not
    corrected for its start at 0; ``last_step``, int32, the step of the last arrival, or 0.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    last_step: Tensor


def lag_adam_(parameter: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """Take one step, in place, with what arrived: the elements of ``gradient`` that are not 0.

    Args:
        parameter: of any real dtype.
        gradient: of its shape, dtype and device.
        state: of the parameter; changed.
        settings: of the step.

    Communication: none.
    """
    tensors = (parameter, gradient, *state)
    torch.autograd.graph.increment_version(parameter)  # the kernels write behind torch's back
    is_plain = all(t.is_contiguous() for t in tensors) and all(t.dtype == torch.float32 for t in tensors[:4])
    if is_plain and parameter.device.type == "cpu":
        _by_numba_(parameter, gradient, state, settings)
    elif is_plain and parameter.device.type == "cuda":
        by_triton_(parameter, gradient, state, settings)
    elif parameter.dtype in (torch.float32, torch.float64):
        by_torch_(parameter, gradient, state, settings)
    else:  # in 16 bits b would stay where it is: one step in a thousand is less than its rounding
        wide = [tensor.float() for tensor in tensors[:4]]
        by_torch_(wide[0], wide[1], State(wide[2], wide[3], state.last_step), settings)
        for tensor, value in zip((parameter, *state[:2]), (wide[0], *wide[2:]), strict=True):
            tensor.copy_(value)


def by_torch_(parameter: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """The reference of :func:`lag_adam_`, for float32 and float64, on any device.

    Where x, an element of the gradient, is not 0, and its last arrival was tau steps ago::

        b <- beta2^tau * b + (1 - beta2^tau) * x^2 / tau
        m <- beta1 * m + (1 - beta1) * x / (sqrt(b / (1 - beta2^step)) + eps)

    elsewhere ``m <- beta1 * m``; everywhere ``w <- (1 - rate * weight_decay) * w - rate / (1 - beta1^step) * m``.
    """
    least, beta1, rest1, sign, root, eps, decay, rate = settings.scalars()
    exp_avg, exp_avg_sq, last_step = state
    x = gradient * sign
    waited = (settings.step - last_step).clamp(min=1)
    weights = weights_of(settings, parameter.device)[waited.clamp(max=longest_wait(settings))].to(parameter.dtype)
    new = weights[..., 0] * exp_avg_sq + weights[..., 1] * (x * x / waited)
    arrives = x != 0
    exp_avg_sq.copy_(torch.where(arrives, new, exp_avg_sq))
    last_step[arrives] = settings.step
    exp_avg.mul_(beta1)
    exp_avg[exp_avg.abs() < least] = 0
    deviation = exp_avg_sq.double().sqrt().to(x.dtype)  # of float32 on a CPU, torch's root is not always the nearest
    exp_avg += torch.where(arrives, rest1 * (x / (deviation * root + eps)), 0)
    parameter.mul_(decay).sub_(rate * exp_avg)


def _by_numba_(parameter: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    arrays = [tensor.detach().view(-1).numpy() for tensor in (parameter, gradient, *state)]
    numbers = tuple(map(np.float32, settings.scalars()))
    weights = weights_of(settings, parameter.device).numpy()
    run_on_threads(cpu.threads_for(parameter.numel()), loops.lag_adam, *arrays, weights, settings.step, numbers)


def by_triton_(parameter: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """:func:`lag_adam_` by the GPU's kernel."""
    from hvd_sketch.kernels import gpu
    from hvd_sketch.kernels._gpu_lag_adam import lag_adam

    size = parameter.numel()
    numbers = settings.step, longest_wait(settings), size, *settings.scalars()
    arguments = parameter, gradient, *state, weights_of(settings, parameter.device), *numbers
    gpu._launch(lag_adam, ceil_div(size, gpu.TILE), *arguments, TILE=gpu.TILE, enable_fp_fusion=False)


def longest_wait(settings: Settings) -> int:
    """The last entry of :func:`weights_of`: longer waits weigh the same."""
    beta2 = settings.beta2
    forgotten = math.ceil(LEAST_WEIGHT_BITS * math.log(2) / -math.log(beta2)) if beta2 > 0 else 1
    return min(max(forgotten, 1), 1 << settings.step.bit_length())


def weights_of(settings: Settings, device: torch.device) -> Tensor:
    """``beta2^tau`` and ``1 - beta2^tau``, for all tau that there can be: float32 [longest_wait + 1, 2]."""
    return _weights(settings.beta2, longest_wait(settings), device)


@lru_cache(maxsize=16)
def _weights(beta2: float, longest: int, device: torch.device) -> Tensor:
    past = beta2 ** np.arange(longest + 1, dtype=np.float64)
    past[past < 2.0**-LEAST_WEIGHT_BITS] = 0
    return torch.from_numpy(np.stack([past, 1 - past], axis=1).astype(np.float32)).to(device)


def warm_up() -> None:
    """Compile the kernel for CPUs where Numba's cache does not hold it. Communication: none."""
    zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
    state = State(zeros(1), zeros(1), torch.zeros(1, dtype=torch.int32, device="cpu"))
    lag_adam_(zeros(1), zeros(1), state, Settings(1, 0.1, 0.9, 0.999, 1e-8, 0.0))
