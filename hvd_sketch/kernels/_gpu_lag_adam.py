"""Triton code of one step of Adam on sums that arrive late; :mod:`hvd_sketch.kernels.lag_adam` launches it."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

_VARYING = ["step", "longest", "size"]


@triton.jit(do_not_specialize=_VARYING)
def lag_adam(
    parameter, gradient, exp_avg, exp_avg_sq, last_step, weights, step, longest, size,
    least, beta1, rest1, sign, root, eps, decay, rate, TILE: tl.constexpr,
):  # fmt: skip
    """See :func:`hvd_sketch.kernels.lag_adam.lag_adam_`. Compile it without fused rounding."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < size
    x = tl.load(gradient + at, mask=mask, other=0.0) * sign
    arrives = x != 0
    moment = tl.load(exp_avg + at, mask=mask, other=0.0) * beta1
    moment = tl.where(tl.abs(moment) < least, 0.0, moment)
    waited = tl.maximum(step - tl.load(last_step + at, mask=arrives, other=0), 1)
    weight = weights + 2 * tl.minimum(waited, longest)
    square = tl.div_rn(x * x, waited.to(tl.float32))
    new = tl.load(weight, mask=arrives, other=0.0) * tl.load(exp_avg_sq + at, mask=arrives, other=0.0)
    new += tl.load(weight + 1, mask=arrives, other=0.0) * square
    normalised = tl.div_rn(x, tl.sqrt_rn(new) * root + eps)
    moment = tl.where(arrives, moment + rest1 * normalised, moment)
    value = tl.load(parameter + at, mask=mask, other=0.0)
    tl.store(parameter + at, decay * value - rate * moment, mask=mask)
    tl.store(exp_avg + at, moment, mask=mask)
    tl.store(exp_avg_sq + at, new, mask=arrives)
    tl.store(last_step + at, step + tl.zeros([TILE], tl.int32), mask=arrives)
