"""What ``python -m benchmarks.kernels`` times of few-bit codes and of a step with nominated candidates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.coding import load_coding
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.kernels import load_backend, reference
from hvd_sketch.kernels.selection import top_k
from hvd_sketch.model.flat_parameters import FlatParameters
from hvd_sketch.transport import LocalTransport, local_transports

RANKS, BITS, WIRE_RATIO = 4, 4, 150
SMALL_LENGTHS = (1, 777, 100_003)
PARAMETERS = 25  # that the update is unpacked into


def few_bit_operations(values: Tensor) -> dict[str, Callable[[], object]]:
    """Codes of float32 [n], as a rank makes them of its candidates, and the sum of as many codes of all ranks."""
    kernels = load_backend(None, values.device)
    row = values.view(1, -1)
    length = values.numel()
    arrived = torch.stack([kernels.quantize(row, BITS)] * RANKS)

    def both() -> None:
        kernels.quantize(row, BITS)
        kernels.dequantize_sum(arrived, length, BITS)

    return {
        "quantise + pack": lambda: kernels.quantize(row, BITS),
        "unpack + add": lambda: kernels.dequantize_sum(arrived, length, BITS),
        "few-bit codes": both,
    }


def wrong_few_bits(device: torch.device) -> list[str]:
    """What differs from the reference."""
    kernels, wrong = load_backend(None, device), []
    for length in SMALL_LENGTHS:
        values = torch.randn(RANKS, 1, length)
        for dither in (None, 7):
            expected = torch.stack([reference.quantize(own, BITS, dither) for own in values])
            codes = torch.stack([kernels.quantize(own.to(device), BITS, dither) for own in values])
            if not torch.equal(codes.cpu(), expected):
                wrong.append(f"codes of {length} values: differ from the reference's")
        total = kernels.dequantize_sum(codes, length, BITS).cpu()
        if not torch.equal(total, reference.dequantize_sum(expected, length, BITS)):
            wrong.append(f"sum of {length} codes: differs from the reference's")
    return wrong


class OneOfFour(LocalTransport):
    """A rank to which three others send what it sends itself, but for the coordinates that they nominate.

    Attributes:
        nominated: the codes of the others' coordinates.
    """

    def __init__(self) -> None:
        super().__init__(local_transports(1)[0]._room, 0)
        self.size = RANKS
        self.nominated: list[Tensor] | None = None

    def alltoall(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor[0]] * RANKS)

    def allgather(self, tensor: Tensor) -> Tensor:
        is_nomination = self.nominated is not None and tensor.ndim == 1 and tensor.dtype == torch.uint8
        return torch.cat([tensor, *(self.nominated if is_nomination and self.nominated else [tensor] * (RANKS - 1))])


class NominatedSteps:
    """Steps of one rank of four: from error feedback to the gradient of every parameter.

    The check for NaN and Inf comes before: it is timed on its own.
    The others nominate coordinates at random: nearly all of the union's are distinct.
    """

    def __init__(self, gradients: list[Tensor]) -> None:
        device, dim = gradients[0].device, gradients[0].numel()
        self.config = SketchConfig.for_wire_ratio(WIRE_RATIO, dim, RANKS, candidates="nominate")
        transport = OneOfFour()
        self.exchange = SketchedAllreduce(self.config, dim, transport, device)
        self.own_count = -(-self.config.k // RANKS)
        self.others = [torch.randint(dim, (self.own_count,)).unique().to(device) for _ in range(RANKS - 1)]
        coding = load_coding(load_backend(None, device))
        transport.nominated = [coding.encode_positions(positions, dim) for positions in self.others]
        sizes = [dim // PARAMETERS] * (PARAMETERS - 1)
        sizes.append(dim - sum(sizes))
        self.parameters = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        self._flat = FlatParameters([(str(i), p) for i, p in enumerate(self.parameters)])
        self._gradients = gradients
        self._done = 0

    def __call__(self) -> SparseUpdate:
        self._done += 1
        self.exchange.accumulate([self._gradients[self._done % len(self._gradients)]])
        update = self.exchange.agree()
        assert update.indices is not None
        self._flat.unpack_sparse(update.indices, update.values)
        return update


def wrong_nominated_step(steps: NominatedSteps) -> list[str]:
    """One step, not the first one: the union, what is kept of v, and the gradients."""
    gradient, residual = steps._gradients[(steps._done + 1) % len(steps._gradients)], steps.exchange.residual
    before = residual + gradient
    update = steps()
    assert update.indices is not None
    wrong, named = [], torch.cat([top_k(before, steps.own_count), *steps.others]).unique()
    if not torch.equal(update.indices, named):
        wrong.append("nominated step: not the union of the largest of v and of what the others name")
        return wrong
    sent = before - residual
    total = torch.cat([p.grad for p in steps.parameters if p.grad is not None])
    if not torch.equal(sent.nonzero().flatten(), named[sent[named] != 0]):
        wrong.append("nominated step: v changed where nothing was sent")
    if not torch.equal(total[named], update.values) or total.count_nonzero() != update.values.count_nonzero():
        wrong.append("nominated step: the gradients are not the update")
    # This rank's own share: all four send the same, and their mean is rounded once more.
    share = slice(0, -(-len(named) // RANKS))
    error = (update.values[share] - before[named[share]]).abs().max() / before.abs().max()
    if not float(error) < 2 / 2**BITS:
        wrong.append(f"nominated step: the mean is off by {float(error):.0%} of the largest value")
    return wrong
