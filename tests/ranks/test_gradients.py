"""Gradients in parts, and sums that do not fit: nothing changes, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hvd_sketch.config import LowRankConfig, SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce
from hvd_sketch.model import flat_parameters
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from tests.support.targets import float_gradient

pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")
RANKS = [1, 2, 3]


@pytest.fixture(autouse=True)
def small_parts() -> Iterator[None]:
    """Parameters from 100 elements on are parts of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_parameters, "MIN_ALONE", 100)
        yield


def make_model() -> nn.Sequential:
    """Large and small parameters in turn, and one no backward pass reaches."""
    model = nn.Sequential(nn.Linear(9, 30), nn.Tanh(), nn.Linear(30, 2), nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 8))
    model.register_parameter("unused", nn.Parameter(torch.ones(6, 6)))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def backward(model: nn.Module, rank: int, step: int) -> None:
    inputs = torch.randn(5, 9, generator=torch.Generator().manual_seed(100 * rank + step))
    model(inputs).square().sum().backward()


@pytest.mark.parametrize("ranks", RANKS)
def test_a_gradient_may_come_in_parts(ranks: int) -> None:
    """Whole numbers: sums are exact, so that the parts' order does not show."""
    dim, cuts = 3001, [0, 7, 1000, 1000, 2999]

    def main(transport: LocalTransport, in_parts: bool) -> list[Tensor]:
        exchange = SketchedAllreduce(SketchConfig.paper(cols=300, k=50), dim, transport)
        found = []
        for step in range(3):
            gradient = float_gradient(dim, transport.rank, step).mul(8).round()
            parts = list(gradient.tensor_split(cuts[1:]))
            update = exchange.step(parts if in_parts else gradient)
            found += [update.indices, update.values]
        return [*found, exchange.residual.clone(), exchange.velocity.clone()]

    whole, parts = (run_local(ranks, partial(main, in_parts=in_parts)) for in_parts in (False, True))
    assert all(map(torch.equal, whole[0], parts[0]))


def test_a_large_plain_gradient_is_read_as_it_lies() -> None:
    model = make_model()
    backward(model, 0, 0)
    flat = flat_parameters.FlatParameters(
        [pair for pair in model.named_parameters() if pair[1].ndim > 1], in_slices=True
    )
    assert [[p.numel() for p, _, _ in part] for part in flat.slices] == [[36], [270], [60, 40], [160]]
    parts = flat.pack()
    large = [p for p in model.parameters() if p.numel() >= 100]
    assert [part.data_ptr() for part in parts if part.numel() in (270, 160)] == [p.grad.data_ptr() for p in large]
    in_one = flat_parameters.FlatParameters([pair for pair in model.named_parameters() if pair[1].ndim > 1])
    assert torch.equal(torch.cat(parts), in_one.pack()[0])
    assert flat.pack(weight_decay=0.1)[1].data_ptr() != large[0].grad.data_ptr()


class SharedGradients(nn.Module):
    """Autograd leaves gradients in one memory: of a and b the same, of c and d the two halves of e's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
        self.c, self.d, self.e = (nn.Parameter(torch.zeros(rows, 50)) for rows in (30, 10, 40))

    def backward(self, rank: int, step: int) -> None:
        draw = torch.Generator().manual_seed(100 * step + rank)
        square, line = torch.randn(64, 64, generator=draw), torch.randn(40, 50, generator=draw)
        loss = ((self.a.view(-1) + self.b.view(-1)).view(64, 64) * square).sum()
        (loss + ((torch.cat([self.c, self.d]) + self.e) * line).sum()).backward()


@pytest.mark.parametrize("dense_below", [0, 1000])  # with 1000 one half of e's is dense
@pytest.mark.parametrize(
    "config",
    [SketchConfig(k=400, candidates="nominate"), SketchConfig(k=400, candidates="random"), LowRankConfig(rank=4)],
)
def test_gradients_that_share_memory_lose_nothing(config: Any, dense_below: int) -> None:
    def main(transport: LocalTransport) -> None:
        model = SharedGradients()
        compression = replace(config, dense_below=dense_below)
        optimizer = DistributedOptimizer(
            SGD(model.parameters(), lr=1.0), model.named_parameters(), compression, transport
        )
        produced = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for step in range(5):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            starts = [parameter.grad.data_ptr() for parameter in model.parameters()]
            assert starts[0] == starts[1], "or this tests nothing"
            for total, parameter in zip(produced, model.parameters(), strict=True):
                total += transport.allreduce_(parameter.grad.clone()) / transport.size
            optimizer.step()
        left = transport.allreduce_(optimizer.exchange.residual.clone()) / transport.size
        compressed = [n for n, parameter in enumerate(model.parameters()) if parameter.numel() >= dense_below]
        pieces = dict(zip(compressed, left.split([produced[n].numel() for n in compressed]), strict=True))
        for number, (total, parameter) in enumerate(zip(produced, model.parameters(), strict=True)):
            kept = pieces[number].view(total.shape) if number in pieces else 0.0
            torch.testing.assert_close(kept - parameter.detach(), total, rtol=1e-4, atol=1e-4)

    run_local(2, main)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_plays_no_part(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for config in (SketchConfig.paper(cols=90, k=30, dense_below=8), None):
            model = make_model().float()
            inner = SGD(model.parameters(), lr=0.1)
            optimizer = DistributedOptimizer(inner, model.named_parameters(), config, local_transports(1)[0])
            for _ in range(2):
                model(torch.ones(1, 9, dtype=torch.float32)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert all(p.dtype == torch.float32 for p in model.parameters())
    finally:
        torch.set_default_dtype(before)


def test_a_gradient_that_requires_a_gradient() -> None:
    exchange = SketchedAllreduce(SketchConfig.paper(cols=30, k=5), 100, local_transports(1)[0])
    for _ in range(2):
        update = exchange.step(torch.ones(100, requires_grad=True))
    assert update.indices.numel() == 5 and not exchange.residual.requires_grad


@pytest.mark.parametrize("saved", [0.0, 0.9])
def test_dense_state_loads_under_another_momentum(saved: float) -> None:
    def make(momentum: float) -> DenseAllreduce:
        return DenseAllreduce(SketchConfig.paper(cols=30, k=5, momentum=momentum), 100, local_transports(1)[0])

    first, second = make(saved), make(0.9 - saved)
    first.step(torch.ones(100))
    second.load_state_dict(first.state_dict())
    assert bool((second.velocity == 0).all())


class Half(nn.Module):
    """A sketched weight and a dense bias, whose gradients are what backward is told."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(4, dtype=dtype))

    def backward(self, weight: float, bias: float) -> None:
        (self.weight.sum() * weight + self.bias.sum() * bias).backward()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("config", [SketchConfig.paper(cols=60, k=8, dense_below=8, momentum=0.0), None])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, 3e38), (torch.float16, 6e4)])
def test_a_dense_sum_that_overflows_is_cut_to_what_fits(
    dtype: torch.dtype, bias: float, config: SketchConfig | None, ranks: int
) -> None:
    """In float32 already, or in the parameter's own dtype after momentum: cut to what the dtype holds."""

    def main(transport: LocalTransport) -> tuple[list[float], int]:
        model = Half(dtype)
        sketch = None if config is None else SketchConfig.paper(**(vars(config) | {"momentum": 0.5}))
        optimizer = DistributedOptimizer(SGD(model.parameters(), lr=1e-3), None, sketch, transport)
        updates = []
        for _ in range(2):
            optimizer.zero_grad()
            model.backward(1.0, bias)
            optimizer.step()
            updates.append(float(model.bias.grad[0]))  # type: ignore[index]
        return updates, optimizer.skipped_steps

    largest = torch.finfo(dtype).max
    second = min(1.5 * bias, largest) if config is not None else bias
    for updates, skipped in run_local(ranks, main):
        assert skipped == 0
        assert updates == pytest.approx([bias, second], rel=1e-3)


def test_an_update_too_large_for_its_dtype_stays_in_the_residual() -> None:
    model = Half(torch.float16)
    config = SketchConfig.paper(cols=60, k=8, oversample=8, dense_below=8, momentum=0.0)
    optimizer = DistributedOptimizer(SGD(model.parameters(), lr=1e-3), None, config, local_transports(1)[0])
    produced, sent, largest = torch.zeros(64), torch.zeros(64), 0.0
    for step in range(20):
        optimizer.zero_grad()
        model.backward(30000.0 if step < 4 else 0.0, 1.0)
        produced += 30000.0 if step < 4 else 0.0
        optimizer.step()
        update = model.weight.grad.float().flatten()  # type: ignore[union-attr]
        largest = max(largest, float(update.max()))
        sent += update
        assert torch.equal(sent + optimizer.exchange.residual, produced)  # type: ignore[union-attr]
    assert largest == torch.finfo(torch.float16).max, "the test says nothing where everything fits"
    assert optimizer.skipped_steps == 0 and not optimizer.exchange.residual.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("empty", [(0,), (0, 40)])
@pytest.mark.parametrize("dense_below", [0, 100, 10_000])
@pytest.mark.parametrize(
    "make",
    [partial(SketchConfig, k=50, candidates="nominate"), partial(LowRankConfig, rank=2)],
    ids=["nominate", "low rank"],
)
def test_a_parameter_without_elements_goes_along(make: Any, dense_below: int, empty: tuple[int, ...]) -> None:
    """As a rank's shard of a matrix with few rows."""

    def main(transport: LocalTransport, with_empty: bool) -> Tensor:
        named = [("matrix", nn.Parameter(torch.ones(40, 30)))]
        if with_empty:
            named.append(("empty", nn.Parameter(torch.ones(empty))))
        parameters = [parameter for _, parameter in named]
        optimizer = DistributedOptimizer(SGD(parameters, lr=0.1), named, make(dense_below=dense_below), transport)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * transport.rank + step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return parameters[0].detach()

    alone, beside = (run_local(2, partial(main, with_empty=with_empty), 60) for with_empty in (False, True))
    assert torch.equal(beside[0], beside[1]) and torch.equal(beside[0], alone[0])
