"""Products of low-rank factors are float32's, whatever the user told torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hvd_sketch.kernels.low_rank import full_precision
from hvd_sketch.transport import local_transports
from tests.ranks.test_low_rank import build, gradient


@pytest.fixture
def precision() -> Iterator[Callable[[], list[str]]]:
    """What torch was told about products, by backend; what a test tells it is forgotten."""
    backends = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    yield lambda: [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "none"


PRECISIONS: dict[str, Callable[[], None]] = {
    "of all": lambda: torch.set_float32_matmul_precision("medium"),
    "of CUDA, in the older way": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "of CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "of CPUs": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "of every backend": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_products_are_exact_whatever_torch_was_told(name: str, precision: Callable[[], list[str]]) -> None:
    """A user may train in bfloat16 or TF32, and step the optimizer inside autocast."""
    plain, told = (build(local_transports(1)[0]) for _ in range(2))
    steps = [plain.step(gradient(0, step)) for step in range(3)]
    PRECISIONS[name]()
    before = precision()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(told.step(gradient(0, step)).values, steps[step].values) for step in range(3))
    assert torch.equal(told.residual, plain.residual)
    assert precision() == before
    if name == "of every backend":
        torch.backends.fp32_precision = "ieee"
        assert set(precision()) == {"ieee"}, "what one backend has from all it goes on having from all"
    with full_precision(torch.device("cpu")):
        assert set(precision()[1:]) == {"ieee"}
        assert torch.zeros(1, 1) @ torch.zeros(1, 1) == 0
