"""Numba code of Adam on sums that arrive late: a step of it, and where it will come to.

:mod:`hvd_sketch.kernels.lag_adam` and :mod:`hvd_sketch.kernels.step_ahead` call it.
Every operation is rounded on its own: all CPUs give the same bits. All that the kernel calls is in this one file,
because Numba's on-disk cache only notices changes of the file of the cached function.
"""

from __future__ import annotations

import numpy as np
from numba import njit

Array = np.ndarray
# LEAST_MOMENT, beta1, 1 - beta1, sign, 1 / root of the bias correction, eps, decay, rate.
Scalars = tuple[np.float32, ...]

STRETCH = 2048  # coordinates at a time: five arrays of them stay in the first cache over the three loops


@njit(nogil=True, cache=True, error_model="numpy")
def lag_adam(
    parameter: Array,
    gradient: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    last_step: Array,
    weights: Array,
    step: int,
    scalars: Scalars,
    thread: int,
    threads: int,
) -> None:
    """See :func:`hvd_sketch.kernels.lag_adam.lag_adam_`; threads divide the coordinates."""
    least, beta1, rest1, sign, root, eps, decay, rate = scalars
    longest = len(weights) - 1
    places = np.empty(STRETCH, dtype=np.uint64)
    stop = (thread + 1) * parameter.size // threads
    for first in range(thread * parameter.size // threads, stop, STRETCH):
        last = min(first + STRETCH, stop)
        moment, arriving = exp_avg[first:last], gradient[first:last]
        count = np.uint64(moment.size)
        for i in range(count):  # a vector loop, as the last one
            kept = beta1 * moment[i]
            moment[i] = np.float32(0) if abs(kept) < least else kept
        arrived = 0
        for i in range(count):  # without a branch: its mispredictions would keep cache misses from overlapping
            places[arrived] = i
            arrived += arriving[i] != np.float32(0)
        for place in places[:arrived]:
            at = np.uint64(first) + place
            x = sign * arriving[place]
            waited = max(step - last_step[at], 1)
            weight = weights[min(waited, longest)]
            new = weight[0] * exp_avg_sq[at] + weight[1] * (x * x / np.float32(waited))
            exp_avg_sq[at] = new
            last_step[at] = step
            moment[place] += rest1 * (x / (np.sqrt(new) * root + eps))
        value = parameter[first:last]
        for i in range(count):
            value[i] = decay * value[i] - rate * moment[i]


@njit(nogil=True, cache=True, error_model="numpy")
def step_ahead(
    parameter: Array, left: Array, exp_avg_sq: Array, kept: Array, scalars: Scalars, thread: int, threads: int
) -> None:
    """See :func:`hvd_sketch.kernels.step_ahead.step_ahead_`; threads divide the coordinates."""
    scale, root, eps, most, rate = scalars
    begin, end = thread * parameter.size // threads, (thread + 1) * parameter.size // threads
    value, gradient, square, before = parameter[begin:end], left[begin:end], exp_avg_sq[begin:end], kept[begin:end]
    nothing = np.float32(0)
    for i in range(np.uint64(value.size)):
        before[i] = value[i]
        move = scale * gradient[i] / (np.sqrt(square[i]) * root + eps)
        move = min(max(move, -most), most)
        value[i] -= rate * (move if square[i] > nothing and gradient[i] == gradient[i] else nothing)
