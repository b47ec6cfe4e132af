"""What ``python -m benchmarks.kernels`` times of a low-rank step."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from benchmarks.kernels.few_bits import BITS, RANKS, WIRE_RATIO
from hvd_sketch import LowRankAllreduce, LowRankConfig
from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.exchange.matrices import within_bytes
from hvd_sketch.model.flat_parameters import FlatParameters
from hvd_sketch.transport import local_transports
from hvd_sketch.wire_bytes import DENSE_BYTES

ROUNDING = 1e-5  # of float32, in units of the largest value


class LowRankSteps:
    """Steps of a rank that is alone: from error feedback to the gradient of every parameter.

    More ranks compute as much, but for the sums of factors of a hundredth of the vector.
    """

    def __init__(self, gradients: list[Tensor]) -> None:
        device, dim = gradients[0].device, gradients[0].numel()
        shapes = shapes_of_size(dim)
        config = within_bytes(shapes, DENSE_BYTES * dim / WIRE_RATIO, RANKS, BITS) or LowRankConfig(rank=1)
        self.exchange = LowRankAllreduce(config, dim, local_transports(1)[0], device, shapes=shapes)
        self.parameters = [torch.nn.Parameter(torch.zeros(prod(shape), device=device)) for shape in shapes]
        self._flat = FlatParameters([(str(i), p) for i, p in enumerate(self.parameters)])
        self._gradients = gradients
        self._done = 0

    @property
    def next_gradient(self) -> Tensor:
        return self._gradients[(self._done + 1) % len(self._gradients)]

    def __call__(self) -> None:
        gradient = self.next_gradient
        self._done += 1
        self.exchange.accumulate([gradient])
        self._flat.unpack_dense(self.exchange.agree().values)


def wrong_low_rank_step(steps: LowRankSteps) -> list[str]:
    """One step: what was sent and what is kept are what was produced, and something was sent."""
    produced = steps.exchange.residual + steps.next_gradient
    steps()
    sent = torch.cat([p.grad for p in steps.parameters if p.grad is not None])
    lost = (produced - sent - steps.exchange.residual).abs().max() / produced.abs().max()
    wrong = [] if float(lost) < ROUNDING else [f"low-rank step: {float(lost):.0e} of the largest value is lost"]
    if not sent.count_nonzero():
        wrong.append("low-rank step: nothing is sent")
    return wrong
