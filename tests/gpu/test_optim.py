"""The Triton kernel of LagAdamW against the reference: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from hvd_sketch.kernels.lag_adam import State, by_torch_, by_triton_
from tests.unit.test_optim import a_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [1, 1023, 1025, 5000])
def test_the_kernel_has_the_reference_bits(size: int) -> None:
    parameter, gradient, state, settings = a_state(size, size)
    ours = [tensor.to(DEVICE, copy=True) for tensor in (parameter, *state)]
    by_triton_(ours[0], gradient.to(DEVICE), State(*ours[1:]), settings)
    by_torch_(parameter, gradient, state, settings)
    for tensor, reference in zip(ours, (parameter, *state), strict=True):
        assert torch.equal(tensor.cpu(), reference)
