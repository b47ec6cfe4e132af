"""torch.set_default_dtype() and torch.set_default_device() change nothing of what is exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import DistributedOptimizer, SketchConfig
from hvd_sketch.config import Compression
from hvd_sketch.transport import LocalTransport, run_local
from hvd_sketch.warm_up import _calls_of_every_kernel
from tests.support.rounds import COMPRESSIONS, flat, network, wrap
from tests.support.toy import LIMIT_S

CONFIGS: dict[str, Compression | None] = COMPRESSIONS | {
    "heavymix": SketchConfig(cols=400, k=100, candidates="heavymix"),
    "table in few bits": SketchConfig(cols=400, k=100, oversample=1, value_bits=4, table_bits=8),
}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(name: str, every: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Parameters of float32 on CPUs after some steps, and an end for which one rank has no data, under defaults."""
    models = [network() for _ in range(2)]
    random = torch.Generator().manual_seed(1)
    batches = torch.randn(2, 5, 8, 30, generator=random)

    def main(transport: LocalTransport) -> Tensor:
        with torch.device(device):  # of this thread
            return train(transport, models[transport.rank])

    def train(transport: LocalTransport, model: nn.Module) -> Tensor:
        if every:
            optimizer = wrap(transport, model, CONFIGS[name], every=every)
        else:
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = DistributedOptimizer(inner, model.named_parameters(), CONFIGS[name], transport)
        with optimizer.join():
            for batch in batches[transport.rank, : 4 + transport.rank]:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        return flat(model.parameters())

    with default(dtype):
        return run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_have_the_same_bits_under_any_default_dtype(name: str, every: int, dtype: torch.dtype) -> None:
    for ours, theirs in zip(trained(name, every, dtype), trained(name, every), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_kernels_are_compiled_on_any_default_device() -> None:
    with torch.device("meta"):
        for call in _calls_of_every_kernel():
            call()


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_updates_have_the_same_bits_on_any_default_device(name: str, every: int) -> None:
    """Tensors of the device "meta" hold nothing: who makes one by default, and not where it is needed, fails."""
    for ours, theirs in zip(trained(name, every, device="meta"), trained(name, every), strict=True):
        assert torch.equal(ours, theirs)
