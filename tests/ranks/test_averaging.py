"""Which gradients DistributedOptimizer averages, when, and what becomes of ``p.grad``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hvd_sketch import recommended
from hvd_sketch.config import SketchConfig
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, RANKS, Toy, alone, assert_all_equal, everything, integers, little, mean_of, wrap

# --- what p.grad may be like


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048), (torch.bfloat16, 256), (torch.float64, 8)])
@pytest.mark.parametrize("config", [everything(60), None])
def test_gradients_keep_the_dtype_and_are_added_in_float32(
    dtype: torch.dtype, large: int, config: SketchConfig | None
) -> None:
    """``large + 1`` is no number of the dtype: added in it, the ones would be lost."""

    def rank_main(transport: LocalTransport) -> tuple[list[Tensor], list[torch.dtype]]:
        model = Toy(dtype)
        optimizer = wrap(transport, model, config)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, [large, 1, 1, 2][transport.rank])
        optimizer.step()
        return model.gradients(), [p.dtype for p in model.parameters()]

    for gradients, dtypes in run_local(4, rank_main, LIMIT_S):
        assert all(g.dtype == dtype and bool((g == (large + 4) / 4).all()) for g in gradients)
        assert dtypes == [dtype] * 3


def test_the_ledger_compares_with_the_gradient_in_its_own_dtype() -> None:
    def ratio(dtype: torch.dtype) -> float:
        model = Toy(dtype)
        optimizer = wrap(alone(), model, little())
        model.backward(0, 0)
        optimizer.step()
        return optimizer.ledger.compression_ratio()

    assert ratio(torch.bfloat16) * 2 == ratio(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", ["sgd", "signsgd"])
def test_a_recommended_ratio_is_that_of_the_ledger_in_any_dtype(dtype: torch.dtype, optimizer: Any) -> None:
    def main(transport: LocalTransport) -> float:
        model = nn.Linear(300, 200, bias=False, dtype=dtype)
        compression = recommended(model.parameters(), 40, transport.size, optimizer)
        wrapped = wrap(transport, model, compression)
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(5):
            model.weight.grad = torch.randn(200, 300, generator=generator).to(dtype)
            wrapped.step()
        return wrapped.ledger.compression_ratio()

    assert run_local(2, main, LIMIT_S)[0] == pytest.approx(40, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_a_sketch_the_parameters_own_dtype_travels(dtype: torch.dtype) -> None:
    """As with DistributedDataParallel, and nothing is lost by it: p.grad has no more digits."""

    def main(transport: LocalTransport) -> tuple[Tensor, float]:
        parameter = nn.Parameter(torch.zeros(1000, dtype=dtype))
        optimizer = wrap(transport, nn.ParameterList([parameter]), None)
        generator = torch.Generator().manual_seed(transport.rank)
        parameter.grad = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
        own = parameter.grad.clone()
        optimizer.step()
        assert parameter.grad is not None
        mean = sum(transport.allgather(own.double()).view(3, 1000)) / 3
        torch.testing.assert_close(parameter.grad.double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-6)
        return parameter.grad, optimizer.ledger.compression_ratio()

    results = run_local(3, main, LIMIT_S)
    assert all(torch.equal(gradient, results[0][0]) and 0.95 < ratio <= 1 for gradient, ratio in results)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch gives gradients their parameters' dtype")
def test_gradients_of_another_dtype_than_their_parameters_keep_their_digits() -> None:
    def main(transport: LocalTransport) -> Tensor:
        parameter = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        parameter.grad_dtype = torch.float32
        optimizer = wrap(transport, nn.ParameterList([parameter]), None)
        parameter.grad = torch.full((8,), 1 + 2.0**-12 * transport.rank)
        optimizer.step()
        assert parameter.grad is not None
        return parameter.grad

    assert all(bool((gradient == 1 + 2.0**-13).all()) for gradient in run_local(2, main, LIMIT_S))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch gives gradients their parameters' dtype")
def test_ranks_agree_on_the_dtype_of_gradients() -> None:
    """What travels depends on it."""

    def main(transport: LocalTransport) -> None:
        parameter = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        if transport.rank:
            parameter.grad_dtype = torch.float32
        with pytest.raises(ValueError, match=r"with gradients of torch\.float32"):
            wrap(transport, nn.ParameterList([parameter]), None)

    run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("config", [everything(60, weight_decay=0.5), everything(60), None])
def test_missing_gradients_count_as_zeros_unless_all_are_missing(ranks: int, config: SketchConfig | None) -> None:
    """Rank 0 has none: p.grad is created. Nobody has one for ``other``: it stays None."""

    def rank_main(transport: LocalTransport) -> list[Tensor | None]:
        model = Toy()
        torch.nn.init.constant_(model.other, 4.0)
        optimizer = wrap(transport, model, config)
        if transport.rank:
            (model.weight.sum() * 6 + model.bias.sum() * 12).backward()
        optimizer.step()
        return [p.grad for p in model.parameters()]

    for weight, bias, other in run_local(ranks, rank_main, LIMIT_S):
        assert other is None
        if ranks == 1:
            assert weight is None and bias is None
            continue
        part = (ranks - 1) / ranks
        torch.testing.assert_close(weight, torch.full((5, 8), 6.0 * part))
        torch.testing.assert_close(bias, torch.full((3,), 12.0 * part))


@pytest.mark.parametrize("config", [everything(240), little(k=7), None])
def test_any_memory_format_of_parameters_and_gradients(config: SketchConfig | None) -> None:
    """Row-major indices mean the same coordinates in channels_last, transposed and expanded gradients."""

    def after_step(change: Callable[[nn.Parameter, Tensor], None]) -> Tensor:
        parameter = nn.Parameter(torch.zeros(4, 5, 3, 4))
        values = torch.arange(1.0, 241.0).view(4, 5, 3, 4)
        optimizer = DistributedOptimizer(SGD([parameter], lr=1.0), None, config, alone())
        change(parameter, values)
        address = parameter.grad.data_ptr()
        optimizer.step()
        assert parameter.grad.data_ptr() == address
        return parameter.detach().contiguous()

    def channels_last(parameter: nn.Parameter, values: Tensor) -> None:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        parameter.grad = values.contiguous(memory_format=torch.channels_last)

    def transposed(parameter: nn.Parameter, values: Tensor) -> None:
        parameter.grad = values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    expected = after_step(lambda parameter, values: setattr(parameter, "grad", values))
    assert torch.equal(after_step(channels_last), expected) and torch.equal(after_step(transposed), expected)
    assert int((expected != 0).sum()) == (240 if config is None else config.k)


def test_an_expanded_gradient_is_replaced() -> None:
    parameter = nn.Parameter(torch.zeros(4, 5))
    optimizer = DistributedOptimizer(SGD([parameter], lr=1.0), None, little(k=3), alone())
    parameter.grad = torch.ones(1, 1).expand(4, 5)
    optimizer.step()
    assert int((parameter.grad != 0).sum()) == 3


@pytest.mark.parametrize("config", [everything(40), None])
def test_sparse_gradients_are_made_dense(config: SketchConfig | None) -> None:
    def rank_main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        table = nn.Embedding.from_pretrained(torch.zeros(10, 4), freeze=False, sparse=True)
        optimizer = wrap(transport, table, config)
        table(torch.tensor([transport.rank, 5, 5])).sum().backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
        first = table.weight.grad.clone()
        optimizer.zero_grad(set_to_none=False)
        table(torch.tensor([9])).sum().backward()
        optimizer.step()
        return first, table.weight.grad

    for first, second in run_local(2, rank_main, LIMIT_S):
        assert first[:, 0].tolist() == [0.5, 0.5, 0, 0, 0, 2, 0, 0, 0, 0]
        assert second[:, 0].tolist() == [0] * 9 + [1]


# --- synchronize, clipping, several backward passes


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("config", [everything(60), None])
def test_averaged_gradients_can_be_clipped_before_the_step(ranks: int, config: SketchConfig | None) -> None:
    def rank_main(transport: LocalTransport) -> tuple[Tensor, list[Tensor], int]:
        model = Toy()
        optimizer = wrap(transport, model, config)
        model.backward(transport.rank, 0)
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        return norm, [-p.detach() for p in model.parameters()], optimizer.ledger.totals().steps

    mean = mean_of(ranks, 0)
    expected_norm = torch.cat([m.flatten() for m in mean]).norm()
    for norm, moved, steps in run_local(ranks, rank_main, LIMIT_S):
        torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(moved, [m / expected_norm for m in mean])
        assert steps == 1


def test_a_step_after_synchronize_does_not_exchange_again() -> None:
    model = Toy()
    optimizer = wrap(alone(), model, little(momentum=0.9))
    for step in range(2):
        optimizer.zero_grad()
        model.backward(0, step)
        optimizer.synchronize()
        averaged = model.gradients()
        with pytest.warns(UserWarning, match="called twice") as twice:
            optimizer.synchronize()
        with pytest.warns(UserWarning, match=r"step\(\) called without optimizer.skip_synchronize\(\)") as without:
            optimizer.step()
        assert [warned[0].filename for warned in (twice, without)] == [__file__] * 2
        assert_all_equal(model.gradients(), averaged)
        assert optimizer.ledger.totals().steps == step + 1


def test_a_backward_pass_after_synchronize_is_exchanged() -> None:
    model = Toy()
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0)
    optimizer.synchronize()
    optimizer.zero_grad()
    model.backward(0, 1)
    optimizer.step()
    assert optimizer.ledger.totals().steps == 2
    assert_all_equal(model.gradients(), integers(0, 1))


def test_skip_synchronize_refuses_gradients_nobody_averaged() -> None:
    model = Toy()
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0)
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match="call synchronize"):
        optimizer.step()
    optimizer.synchronize()
    optimizer.step()
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match="call synchronize"):
        optimizer.step(lambda: model.backward(0, 1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("config", [everything(60), None])
@pytest.mark.parametrize("expected", [1, 2])
def test_backward_passes_add_up(ranks: int, config: SketchConfig | None, expected: int) -> None:
    def rank_main(transport: LocalTransport) -> list[Tensor]:
        model = Toy()
        optimizer = wrap(transport, model, config, backward_passes_per_step=expected)
        for step in (0, 2):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            model.backward(transport.rank, step + 1)
            optimizer.step()
        return model.gradients()

    for gradients in run_local(ranks, rank_main, LIMIT_S):
        assert_all_equal(gradients, [a + b for a, b in zip(mean_of(ranks, 2), mean_of(ranks, 3), strict=True)])


def test_an_optimizer_that_is_gone_counts_no_more() -> None:
    model = Toy()
    wrap(alone(), model, None)
    gc.collect()
    optimizer = wrap(alone(), model, None, backward_passes_per_step=3)
    for step in range(3):
        model.backward(0, step)
    optimizer.step()
    assert torch.equal(model.bias.grad, sum(integers(0, step)[1] for step in range(3)))


@pytest.mark.parametrize("passes", [0, -1, 1.5, "2"])
def test_backward_passes_per_step_must_be_a_positive_integer(passes: Any) -> None:
    with pytest.raises(ValueError, match="backward_passes_per_step must be an integer of at least 1"):
        wrap(alone(), Toy(), None, backward_passes_per_step=passes)
