"""DistributedOptimizer: equal to dense where it must be, a torch optimizer to everything that expects one."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from hvd_sketch.config import SketchConfig
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.model.parameters import sketched_dim
from hvd_sketch.transport import LocalTransport, local_transports, run_local

LIMIT_S = 60
pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")
RANKS = [1, 2, 3, 4]


def everything(dim: int, **settings: Any) -> SketchConfig:
    """k = dim, no momentum: every coordinate is sent in every step.

    So many columns that no estimate is an exact zero through a collision: those are never candidates.
    """
    return SketchConfig(**{"cols": 100 * dim, "k": dim, "oversample": 1, "momentum": 0.0, "dense_below": 8, **settings})


def little(**settings: Any) -> SketchConfig:
    """10 of 60 coordinates a step, so that residuals fill up."""
    return SketchConfig(**{"cols": 40, "k": 10, "oversample": 2, "momentum": 0.0, "dense_below": 8, **settings})


class Toy(nn.Module):
    """60 coordinates to sketch and 3 dense ones, in the order weight, bias, other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 8, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.other = nn.Parameter(torch.zeros(2, 2, 5, dtype=dtype))

    def backward(self, rank: int, step: int, factor: float = 1.0) -> None:
        """A backward pass whose gradients are ``factor`` times the whole numbers of :func:`integers`."""
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(self.parameters(), integers(rank, step), strict=True))
        (loss * factor).backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters() if p.grad is not None]


def integers(rank: int, step: int) -> list[Tensor]:
    """Gradients of Toy in whole numbers, none of them zero: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    shapes = [(5, 8), (3,), (2, 2, 5)]
    return [torch.randint(1, 9, shape, generator=generator).float() for shape in shapes]


def mean_of(ranks: int, step: int) -> list[Tensor]:
    return [sum(parts) / ranks for parts in zip(*(integers(rank, step) for rank in range(ranks)), strict=True)]


def wrap(
    transport: LocalTransport, model: nn.Module, sketch: SketchConfig | None, **kwargs: Any
) -> DistributedOptimizer:
    return DistributedOptimizer(SGD(model.parameters(), lr=1.0), model.named_parameters(), sketch, transport, **kwargs)


def alone() -> LocalTransport:
    return local_transports(1)[0]


def assert_all_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- training equals training on the mean gradient


def classifier() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def classify(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    inputs = torch.randn(7, 6, generator=generator)
    return nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))


SCHEDULES: dict[str, tuple[Callable[..., Optimizer], Callable[[Optimizer], Any]]] = {
    "sgd-step": (lambda p: SGD(p, lr=0.5, momentum=0.9), lambda o: lr_scheduler.StepLR(o, 2, 0.3)),
    "adam-onecycle": (lambda p: Adam(p, lr=0.1), lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6)),
    "sgd-onecycle": (
        lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=6, cycle_momentum=True),
    ),
    "adamw-lambda": (
        lambda p: AdamW([{"params": list(p)[:2], "lr": 0.3}, {"params": list(p)[2:]}], lr=0.1),
        lambda o: lr_scheduler.LambdaLR(o, [lambda e: 1 / (e + 1), lambda e: 0.5**e]),
    ),
    "sgd-plateau": (lambda p: SGD(p, lr=0.5), lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1)),
}


def advance(scheduler: Any, step: int) -> None:
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(float(step)) if plateau else scheduler.step()


def train_on_mean_gradient(name: str, ranks: int) -> list[Tensor]:
    """What one process does that sees all batches: the truth, without any of our code."""
    model = classifier()
    make, schedule = SCHEDULES[name]
    optimizer = make(list(model.parameters()))
    scheduler = schedule(optimizer)
    for step in range(5):
        summed: list[Tensor] = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(ranks):
            gradients = torch.autograd.grad(classify(model, rank, step), list(model.parameters()))
            summed = [s + g for s, g in zip(summed, gradients, strict=True)]
        for parameter, total in zip(model.parameters(), summed, strict=True):
            parameter.grad = total / ranks
        optimizer.step()
        advance(scheduler, step)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("sketched", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_equals_training_on_the_mean_gradient(name: str, sketched: bool, ranks: int) -> None:
    def train(transport: LocalTransport) -> list[Tensor]:
        model = classifier()
        make, schedule = SCHEDULES[name]
        config = everything(90) if sketched else None
        inner = make(list(model.parameters()))
        optimizer = DistributedOptimizer(inner, model.named_parameters(), config, transport)
        scheduler = schedule(optimizer)
        for step in range(5):
            optimizer.zero_grad()
            classify(model, transport.rank, step).backward()
            optimizer.step()
            advance(scheduler, step)
        return [p.detach() for p in model.parameters()]

    expected = train_on_mean_gradient(name, ranks)
    assert not torch.equal(expected[0], classifier()[0].weight)
    for trained in run_local(ranks, train, LIMIT_S):
        assert_all_equal(trained, expected)


# --- it is a torch optimizer


def test_param_groups_state_and_defaults_are_the_inner_ones() -> None:
    inner = SGD(Toy().parameters(), lr=1.0, momentum=0.5)
    optimizer = DistributedOptimizer(inner, None, None, alone())
    assert isinstance(optimizer, Optimizer)
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
        replacement = copy.copy(getattr(inner, name))
        setattr(optimizer, name, replacement)
        assert getattr(inner, name) is replacement
    inner.load_state_dict(inner.state_dict())  # gives the inner one new objects
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


def test_hooks_run_once_at_the_inner_step() -> None:
    model, calls = Toy(), []
    optimizer = wrap(alone(), model, everything(60))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    model.backward(0, 0)
    optimizer.step()
    assert calls == [("pre", optimizer.inner), ("post", optimizer.inner)]


def test_a_scheduler_attached_before_wrapping_works_without_complaint() -> None:
    model = Toy()
    inner = SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.StepLR(inner, 1, 0.5)
    optimizer = DistributedOptimizer(inner, None, everything(60), alone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            optimizer.zero_grad()
            model.backward(0, step)
            optimizer.step()
            scheduler.step()
    assert torch.equal(model.bias.detach(), -(integers(0, 0)[1] + integers(0, 1)[1] / 2))
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("ranks", [1, 3])
def test_closure_is_evaluated_once_with_gradients_before_the_exchange(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> tuple[list[bool], Any, list[Tensor]]:
        model, grad_enabled = Toy(), []
        optimizer = wrap(transport, model, everything(60))

        def closure() -> str:
            grad_enabled.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            model.backward(transport.rank, 0)
            return "loss"

        with torch.no_grad():
            loss = optimizer.step(closure)
        return grad_enabled, loss, model.gradients()

    for grad_enabled, loss, gradients in run_local(ranks, rank_main, LIMIT_S):
        assert (grad_enabled, loss) == ([True], "loss")
        assert_all_equal(gradients, mean_of(ranks, 0))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("config", [everything(60), None])
def test_zero_grad_both_ways(set_to_none: bool, config: SketchConfig | None) -> None:
    model = Toy()
    optimizer = wrap(alone(), model, config)
    for step in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        if step:
            assert all((p.grad is None) == set_to_none for p in model.parameters())
        model.backward(0, step)
        optimizer.step()
        assert_all_equal(model.gradients(), integers(0, step))


def test_refuses_to_be_copied_and_says_what_it_is() -> None:
    optimizer = wrap(alone(), Toy(), little())
    assert "rank 0 of 1, 60 coordinates sketched, 3 coordinates dense" in repr(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


# --- what it refuses


def test_optimizers_that_cannot_be_wrapped() -> None:
    parameters = list(Toy().parameters())
    with pytest.raises(ValueError, match=r"LBFGS.*use a first-order optimizer"):
        DistributedOptimizer(torch.optim.LBFGS(parameters), None, None, alone())
    with pytest.raises(ValueError, match=r"SparseAdam.*use Adam"):
        DistributedOptimizer(torch.optim.SparseAdam(parameters), None, None, alone())
    with pytest.raises(ValueError, match="already"):
        DistributedOptimizer(DistributedOptimizer(SGD(parameters), None, None, alone()), None, None, alone())
    with pytest.raises(TypeError, match="got Toy"):
        DistributedOptimizer(Toy(), None, None, alone())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SketchConfig, or None for dense, got int"):
        DistributedOptimizer(SGD(parameters), None, 20, alone())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transport must be"):
        DistributedOptimizer(SGD(parameters), None, None, "gloo")


def test_parameters_that_cannot_be_exchanged() -> None:
    def wrapping(*tensors: Tensor) -> None:
        DistributedOptimizer(SGD(list(tensors)), None, None, alone())

    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        wrapping(frozen)
    with pytest.raises(ValueError, match=r"'parameter\.0\.1' is torch\.complex64"):
        wrapping(nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"'parameter\.0\.1' is on the meta device.*to_empty"):
        wrapping(nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta")))
    with pytest.raises(ValueError, match=r"'parameter\.0\.0' has no shape yet: run one forward pass"):
        wrapping(*nn.LazyLinear(3).parameters())


def test_named_parameters_must_fit_the_optimizer() -> None:
    model = Toy()

    def wrapping(named: Any) -> DistributedOptimizer:
        return DistributedOptimizer(SGD(model.parameters()), named, None, alone())

    with pytest.raises(ValueError, match="more than one parameter named 'a'"):
        wrapping([("a", model.weight), ("a", model.bias), ("b", model.other)])
    with pytest.raises(ValueError, match=r"lacks 1 .*parameter\.0\.1 \(shape \(3,\)\)"):
        wrapping([("weight", model.weight), ("other", model.other)])
    with pytest.raises(ValueError, match=r"model\.named_parameters\(\)"):
        wrapping(model.parameters())
    # Tied weights have several names, and a model may hold more than the optimizer: both are fine.
    extra = nn.Parameter(torch.zeros(2))
    optimizer = wrapping([*model.named_parameters(), ("tied", model.weight), ("extra", extra)])
    layout = optimizer.state_dict()["hvd_sketch"]["layout"]
    assert [name for _, name, _ in layout] == ["weight", "bias", "other"]
    assert [name for _, name, _ in wrapping(None).state_dict()["hvd_sketch"]["layout"]] == [
        "parameter.0.0", "parameter.0.1", "parameter.0.2",
    ]  # fmt: skip


def test_parameters_that_come_later_are_refused() -> None:
    model, late = Toy(), nn.Parameter(torch.zeros(4))
    model.other.requires_grad_(False)
    optimizer = wrap(alone(), model, little())
    with pytest.raises(RuntimeError, match="wrap it again"):
        optimizer.add_param_group({"params": [late]})
    model.other.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parameter\.0\.2 .*began to require a gradient"):
        optimizer.step()
    model.other.requires_grad_(False)
    optimizer.inner.add_param_group({"params": [late]})
    with pytest.raises(RuntimeError, match=r"parameter\.1\.0"):
        optimizer.step()
    late.requires_grad_(False)
    model.weight.grad = torch.ones(5, 8)
    optimizer.step()
    assert model.weight.grad is not None and model.other.grad is None and model.bias.grad is None


@pytest.mark.parametrize(
    ("differ", "field"),
    [
        (lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(8, 5))), "weight"),
        (lambda m: setattr(m, "bias", nn.Parameter(torch.zeros(4))), "bias"),
        (lambda m: setattr(m, "other", nn.Parameter(torch.zeros(2, 2, 5).double())), "float64"),
        (lambda m: delattr(m, "bias"), "bias"),
    ],
)
@pytest.mark.parametrize("config", [little(), None])
def test_ranks_with_different_parameters_all_raise(
    differ: Callable[[Toy], None], field: str, config: SketchConfig | None
) -> None:
    def rank_main(transport: LocalTransport) -> str:
        model = Toy()
        if transport.rank == 1:
            differ(model)
        with pytest.raises(ValueError) as caught:
            wrap(transport, model, config)
        return str(caught.value)

    for message in run_local(3, rank_main, LIMIT_S):
        assert field in message and "on rank 1" in message and "ranks 0, 2" in message


@pytest.mark.parametrize(
    ("differ", "told"),
    [
        (lambda m: {"sketch": None}, "config.cols: 40 on ranks 0, 2; none: dense on rank 1"),
        (lambda m: {"backward_passes_per_step": 2}, "backward_passes_per_step: 1 on ranks 0, 2; 2 on rank 1"),
        (lambda m: {"backward_passes_per_step": 0}, "at least 1, got 0"),
        (lambda m: {"named_parameters": [("a", p) for p in m.parameters()]}, "more than one parameter named 'a'"),
        (lambda m: {"optimizer": torch.optim.LBFGS(m.parameters())}, "LBFGS"),
        (lambda m: m.requires_grad_(False) and {}, "no parameter that requires a gradient"),
    ],
)
def test_what_one_rank_refuses_all_refuse(differ: Callable[[Toy], dict[str, Any]], told: str) -> None:
    """Nobody waits for a rank that will not come."""

    def rank_main(transport: LocalTransport) -> str:
        model = Toy()
        arguments = {"optimizer": SGD(model.parameters()), "sketch": little(), "transport": transport}
        with pytest.raises(ValueError) as caught:
            DistributedOptimizer(**arguments | (differ(model) if transport.rank == 1 else {}))
        return str(caught.value)

    for rank, message in enumerate(run_local(3, rank_main, timeout_s=20)):
        assert told in message
        assert rank == 1 or "rank 1" in message


def test_ranks_that_split_parameters_differently_all_raise() -> None:
    def rank_main(transport: LocalTransport) -> str:
        with pytest.raises(ValueError) as caught:
            wrap(transport, Toy(), little(dense_below=8 if transport.rank else 100))
        return str(caught.value)

    assert all("dense_below" in message for message in run_local(2, rank_main, LIMIT_S))


@pytest.mark.parametrize(
    ("inner", "sketch", "message"),
    [
        (lambda p: SGD(p, momentum=0.9), {"momentum": 0.5}, "momentum is applied twice: SGD has 0.9"),
        (lambda p: Adam(p), {"momentum": 0.5}, "momentum is applied twice: Adam has 0.9"),
        (lambda p: SGD(p, weight_decay=0.1), {"weight_decay": 0.2}, "weight decay is applied twice: SGD has 0.1"),
        (lambda p: SGD(p), {"momentum": 0.5, "weight_decay": 0.1}, None),
        (lambda p: Adam(p, betas=(0.0, 0.9)), {"momentum": 0.5}, None),
        (lambda p: AdamW(p, weight_decay=0.1), {}, None),
    ],
)
def test_warns_of_momentum_and_weight_decay_applied_twice(
    inner: Callable[..., Optimizer], sketch: dict[str, Any], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    run_local(2, lambda t: DistributedOptimizer(inner(Toy().parameters()), None, little(**sketch), t) and None, LIMIT_S)
    assert len(caplog.messages) == (message is not None)  # rank 0 speaks for all
    assert message is None or message in caplog.text


# --- which coordinates go which way


def test_sketched_dim_counts_what_is_sketched() -> None:
    model = Toy()
    assert sketched_dim(model.parameters(), dense_below=8) == 60
    assert sketched_dim(model.named_parameters(), dense_below=21) == 40
    assert sketched_dim(model.parameters()) == 0
    assert wrap(alone(), model, everything(40, dense_below=21)).exchange.dim == 40
    model.weight.requires_grad_(False)
    assert sketched_dim(model.parameters(), dense_below=8) == 20


def test_all_dense_when_every_tensor_is_small(caplog: pytest.LogCaptureFixture) -> None:
    def rank_main(transport: LocalTransport) -> list[Tensor]:
        model = Toy()
        optimizer = wrap(transport, model, little(dense_below=1000))
        assert optimizer.exchange is None
        model.backward(transport.rank, 0)
        optimizer.step()
        return model.gradients()

    for gradients in run_local(2, rank_main, LIMIT_S):
        assert_all_equal(gradients, mean_of(2, 0))
    assert len(caplog.messages) == 1 and "Lower dense_below" in caplog.text


@pytest.mark.parametrize("ranks", RANKS)
def test_dense_tensors_get_the_same_momentum_beside_sketched_ones(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> tuple[list[Tensor], Any]:
        model = Toy()
        optimizer = wrap(transport, model, little(momentum=0.5))
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            optimizer.step()
            seen.append(model.bias.grad.clone())
        return seen, optimizer.ledger

    for seen, ledger in run_local(ranks, rank_main, LIMIT_S):
        u = torch.zeros(3)
        for step, gradient in enumerate(seen):
            u = 0.5 * u + mean_of(ranks, step)[1]
            torch.testing.assert_close(gradient, u, rtol=1e-6, atol=0)
        assert ledger.totals().steps == 3
        assert {"sketch", "dense"} <= {record.phase for record in ledger.records}


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_is_lost_also_across_a_skipped_step(ranks: int) -> None:
    """Over all steps: ranks * sent + residuals = produced, in whole numbers; the skipped step counts for nothing."""

    def rank_main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        model, sent = Toy(), torch.zeros(60)
        optimizer = wrap(transport, model, little())
        for step in range(6):
            optimizer.zero_grad()
            model.backward(transport.rank, step, factor=float("nan") if (transport.rank, step) == (0, 2) else 1.0)
            optimizer.step()
            if step != 2:
                sent += torch.cat([model.weight.grad.flatten(), model.other.grad.flatten()]).mul(ranks).round()
        return sent, optimizer.exchange.residual

    results = run_local(ranks, rank_main, LIMIT_S)
    produced = torch.zeros(60)
    for step in (0, 1, 3, 4, 5):
        for rank in range(ranks):
            weight, _, other = integers(rank, step)
            produced += torch.cat([weight.flatten(), other.flatten()])
    kept = sum(residual for _, residual in results)
    for sent, _ in results:
        assert torch.equal(sent + kept, produced)
        assert bool(sent.any()) and bool(kept.any())


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


# --- not finite: all ranks skip


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("bad", ["weight", "bias"])
@pytest.mark.parametrize("config", [little(momentum=0.5), None])
def test_one_bad_rank_makes_all_skip(config: SketchConfig | None, bad: str, early: bool, ranks: int) -> None:
    """Parameters, u and v stay as they were, p.grad is NaN everywhere, and the next step goes on.

    With ``early`` by synchronize().
    """

    def rank_main(transport: LocalTransport) -> tuple[int, list[Tensor]]:
        model = Toy()
        optimizer = wrap(transport, model, config)
        for step in range(3):
            optimizer.zero_grad()
            model.backward(transport.rank, step)
            if step == 1 and transport.rank == ranks - 1:
                getattr(model, bad).grad.view(-1)[2] = float("inf")
            before = [
                optimizer.state_dict()["hvd_sketch"],
                [p.detach().clone() for p in model.parameters()],
            ]
            if early:
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
            saved = optimizer.state_dict()["hvd_sketch"]
            unchanged = [
                all(torch.equal(p, q) for p, q in zip(before[1], model.parameters(), strict=True)),
                all(bool(gradient.isnan().all()) for gradient in model.gradients()),
                all(torch.equal(saved[way][part], before[0][way][part])
                    for way in ("sketched", "dense") if saved[way] for part in ("u", "v") if part in saved[way]),
            ]  # fmt: skip
            assert all(unchanged) == (step == 1) and unchanged[0] == (step == 1), (step, unchanged)
        return optimizer.skipped_steps, [p.detach() for p in model.parameters()]

    results = run_local(ranks, rank_main, LIMIT_S)
    for skipped, parameters in results:
        assert skipped == 1
        assert_all_equal(parameters, results[0][1])


def amp_scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("order", ["step", "unscale", "synchronize"])
@pytest.mark.parametrize("config", [everything(60), None])
def test_grad_scaler_with_inf_on_one_rank(config: SketchConfig | None, order: str, ranks: int) -> None:
    """Every rank has a scale of its own; Inf on the last rank in step 1 makes all skip, and nobody waits."""

    def rank_main(transport: LocalTransport) -> tuple[list[Tensor], int, float]:
        model = Toy()
        optimizer = wrap(transport, model, config)
        scaler = amp_scaler(2.0 ** (transport.rank + 3))
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            bad = step == 1 and transport.rank == ranks - 1
            model.backward(transport.rank, step, factor=float("inf") if bad else float(scaler.scale(torch.ones(()))))
            if order != "step":
                scaler.unscale_(optimizer)
            if order == "synchronize":
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            seen.append([-p.detach() for p in model.parameters()])
            seen[-1] = [p.clone() for p in seen[-1]]
        assert_all_equal(seen[0], seen[1])
        return seen[2], optimizer.skipped_steps, scaler.get_scale()

    for rank, (moved, skipped, scale) in enumerate(run_local(ranks, rank_main, LIMIT_S)):
        assert_all_equal(moved, [a + b for a, b in zip(mean_of(ranks, 0), mean_of(ranks, 2), strict=True)])
        assert skipped == 1
        assert scale == 2.0 ** (rank + 3) / (2 if rank == ranks - 1 else 1)


def test_what_the_scaler_found_makes_all_skip_even_when_mended_since() -> None:
    def rank_main(transport: LocalTransport) -> tuple[int, bool]:
        model, scaler = Toy(), amp_scaler(8.0)
        optimizer = wrap(transport, model, everything(60))
        scaler.scale(torch.ones(()))
        model.backward(transport.rank, 0, factor=float("inf") if transport.rank else 1.0)
        scaler.unscale_(optimizer)
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        scaler.step(optimizer)
        return optimizer.skipped_steps, bool(model.weight.any())

    assert run_local(2, rank_main, LIMIT_S) == [(1, False)] * 2


def test_grad_scaler_must_unscale_before_synchronize() -> None:
    model, scaler = Toy(), amp_scaler(8.0)
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0, factor=float(scaler.scale(torch.ones(()))))
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)


def test_a_disabled_grad_scaler_changes_nothing() -> None:
    model, scaler = Toy(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = wrap(alone(), model, everything(60))
    model.backward(0, 0)
    scaler.step(optimizer)
    scaler.update()
    assert_all_equal(model.gradients(), integers(0, 0))


def test_the_scale_is_undone_in_float32_before_momentum() -> None:
    """2**-30 is zero in float16, and u must not remember the scale of its step."""
    model = Toy(torch.float16)
    optimizer = wrap(alone(), model, little(momentum=0.5))
    for scale in (2.0**30, 2.0**28):
        scaler = amp_scaler(scale)
        scaler.scale(torch.ones(()))
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale * 2.0**-30)
        scaler.step(optimizer)
    u = optimizer.exchange.velocity
    assert set(u.tolist()) == {0.0, 2.0**-30, 1.5 * 2.0**-30}  # sent now, sent before, never sent


# --- checkpoints


def train(transport: LocalTransport, optimizer: DistributedOptimizer, model: Toy, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.backward(transport.rank, step)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adam(transport: LocalTransport, model: nn.Module, **settings: Any) -> DistributedOptimizer:
    inner = Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9))
    return DistributedOptimizer(inner, model.named_parameters(), little(momentum=0.5, **settings), transport)


@pytest.mark.parametrize("ranks", RANKS)
def test_resuming_local_state_is_bitwise(ranks: int) -> None:
    def rank_main(transport: LocalTransport) -> None:
        model = Toy()
        optimizer = adam(transport, model)
        train(transport, optimizer, model, range(3))
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(transport, optimizer, model, range(3, 6))

        resumed = Toy()
        resumed.load_state_dict(saved["model"])
        again = adam(transport, resumed)
        again.load_state_dict(saved["optimizer"])
        train(transport, again, resumed, range(3, 6))
        assert_all_equal(list(resumed.parameters()), list(model.parameters()))
        assert_all_equal([again.exchange.residual, again.exchange.velocity],
                         [optimizer.exchange.residual, optimizer.exchange.velocity])  # fmt: skip
        assert bool(again.exchange.residual.any())

    run_local(ranks, rank_main, LIMIT_S)


@pytest.mark.parametrize("after", RANKS)
def test_consolidated_state_loads_at_any_world_size(after: int) -> None:
    def save(transport: LocalTransport) -> tuple[dict[str, Any], Tensor]:
        model = Toy()
        optimizer = adam(transport, model)
        train(transport, optimizer, model, range(3))
        return through_a_file(optimizer.state_dict(consolidated=True)), optimizer.exchange.residual

    def load(transport: LocalTransport) -> Tensor:
        model = Toy()
        optimizer = adam(transport, model)
        optimizer.load_state_dict(copy.deepcopy(saved[0][0]))  # torch's optimizers keep the tensors that they load
        mean = optimizer.exchange.residual.clone()
        train(transport, optimizer, model, range(3, 5))
        return mean

    saved = run_local(4, save, LIMIT_S)
    expected = sum(residual for _, residual in saved) / 4
    assert all(torch.equal(mean, expected) for mean in run_local(after, load, LIMIT_S))


def test_local_state_is_refused_on_another_rank() -> None:
    states = run_local(2, lambda t: adam(t, Toy()).state_dict(), LIMIT_S)

    def swap(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match="consolidated=True"):
            adam(transport, Toy()).load_state_dict(states[1 - transport.rank])

    run_local(2, swap, LIMIT_S)


def test_state_of_a_plain_optimizer_loads_with_a_warning_and_ours_into_a_plain_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Toy()
    plain = Adam(model.parameters(), lr=0.3)
    model.backward(0, 0)
    plain.step()
    trained = Toy()
    optimizer = adam(alone(), trained)
    train(alone(), optimizer, trained, range(2))
    kept = [optimizer.exchange.residual, optimizer.exchange.velocity, optimizer._gradients.dense.velocity]
    assert all(map(Tensor.any, kept))
    optimizer.load_state_dict(plain.state_dict())
    assert len(caplog.messages) == 1 and "residuals start from zero" in caplog.text
    assert not any(map(Tensor.any, kept))
    assert optimizer.param_groups[0]["lr"] == 0.3
    back = Adam(Toy().parameters())
    back.load_state_dict(optimizer.state_dict())
    assert back.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("change", [{"dense_below": 21}, {"name": "wider"}])
def test_state_saved_for_other_tensors_is_refused(change: dict[str, Any]) -> None:
    model = Toy()
    state = adam(alone(), model).state_dict()
    if "name" in change:
        named = [(change["name"] if n == "other" else n, p) for n, p in model.named_parameters()]
        other = DistributedOptimizer(Adam(model.parameters()), named, little(), alone())
    else:
        other = adam(alone(), model, **change)
    with pytest.raises(ValueError, match=r"tensor 1 is \['sketched', 'other', \[2, 2, 5\]\] there"):
        other.load_state_dict(state)
