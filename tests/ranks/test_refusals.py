"""What DistributedOptimizer refuses, on every rank where one rank is wrong, and what it warns of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RAdam, RMSprop

from benchmarks.accuracy_per_byte.inner import Lion
from hvd_sketch.config import LowRankConfig, SketchConfig
from hvd_sketch.model.broadcast import broadcast_optimizer_state
from hvd_sketch.model.local_steps import LocalSteps
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.optim import LagAdamW, SignSGD
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.toy import LIMIT_S, Toy, alone, little, wrap


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
    with pytest.raises(ValueError, match="LowRankConfig, or None for dense, got int"):
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
        (lambda m: {"sketch": None}, "exchange: SketchedAllreduce on ranks 0, 2; DenseAllreduce on rank 1"),
        (lambda m: {"sketch": None}, "config.cols: 40 on ranks 0, 2; none: dense on rank 1"),
        (
            lambda m: {"sketch": LowRankConfig(rank=1, dense_below=8)},
            "exchange: SketchedAllreduce on ranks 0, 2; LowRankAllreduce on rank 1",
        ),
        (lambda m: {"optimizer": RAdam(m.parameters())}, "wrapped optimizer: SGD on ranks 0, 2; RAdam on rank 1"),
        (
            lambda m: {"optimizer": SGD(m.parameters(), lr=0.1)},
            "lr of group 0 of the wrapped optimizer: 0.001 on ranks 0, 2; 0.1 on rank 1",
        ),
        (
            lambda m: {"optimizer": SGD([{"params": [m.weight, m.bias]}, {"params": [m.other], "weight_decay": 0.1}])},
            "weight_decay of group 1 of the wrapped optimizer: missing on ranks 0, 2; 0.1 on rank 1",
        ),
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


def test_hyper_parameters_that_are_equal_are_so_in_any_form() -> None:
    """Tensors as learning rates, tuples, flags, objects: nothing of them is a matter of the rank."""

    def rank_main(transport: LocalTransport) -> None:
        group = {"params": Toy().parameters(), "lr": torch.tensor(0.5), "betas": (0.5, 0.9), "note": object()}
        DistributedOptimizer(Adam([group], amsgrad=True, capturable=False), None, None, transport)

    run_local(2, rank_main, LIMIT_S)


def test_what_a_rank_has_loaded_before_is_not_compared() -> None:
    """The others get it from there."""

    def rank_main(transport: LocalTransport) -> float:
        model, saved = Toy(), Toy()
        inner = Adam(model.parameters())
        if transport.rank == 0:
            other = Adam(saved.parameters(), lr=0.5)
            saved.backward(0, 0)
            other.step()
            inner.load_state_dict(other.state_dict())
        optimizer = DistributedOptimizer(inner, None, None, transport)
        broadcast_optimizer_state(optimizer, 0, transport)
        return optimizer.param_groups[0]["lr"]

    assert run_local(2, rank_main, LIMIT_S) == [0.5, 0.5]


def test_ranks_that_split_parameters_differently_all_raise() -> None:
    def rank_main(transport: LocalTransport) -> str:
        with pytest.raises(ValueError) as caught:
            wrap(transport, Toy(), little(dense_below=8 if transport.rank else 100))
        return str(caught.value)

    assert all("dense_below" in message for message in run_local(2, rank_main, LIMIT_S))


class Momentous(RAdam):
    """Of a class that nobody knows."""


class FusedAdam(Optimizer):
    """Of a library that nobody knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.999)})


class OurAdamW(AdamW):
    """Derived from one that is known."""


RANK_1 = LowRankConfig(rank=1, dense_below=8)
NOMINATED = {"candidates": "nominate"}


@pytest.mark.parametrize(
    ("inner", "sketch", "message"),
    [
        (lambda p: SGD(p, momentum=0.9), {}, "SGD has momentum, with which candidates='sketch' train worse"),
        (lambda p: SGD(p, momentum=0.9), NOMINATED, None),
        (lambda p: SGD(p, momentum=0.9, nesterov=True), RANK_1, None),
        (lambda p: SGD(p, weight_decay=0.1), {"weight_decay": 0.2}, "weight decay is applied twice: SGD has 0.1"),
        (lambda p: SGD(p), {"momentum": 0.5, "weight_decay": 0.1}, None),
        (lambda p: SGD(p), {"candidates": "random", "residual_decay": 0.9}, "random, residual_decay < 1; not measured"),
        (lambda p: SGD(p), {"residual_decay": 0.9}, "set residual_decay=1"),
        (lambda p: Momentous(p, betas=(0.0, 0.9)), {"momentum": 0.5}, "Momentous has not been shown to train"),
        (
            lambda p: RAdam(p),
            {},
            "well as dense after this exchange (sketch; not measured)",
        ),
        (lambda p: AdamW(p, weight_decay=0.1), NOMINATED, "AdamW has not been shown to train as well as dense"),
        (lambda p: OurAdamW(p), NOMINATED, "OurAdamW has not been shown to train as well as dense"),
        (lambda p: OurAdamW(p), NOMINATED, "(nominate; a loss of 2.49, dense 2.27): take AdamW or Muon with"),
        (lambda p: Adam(p), {}, "Adam has not been shown to train as well as dense"),
        (lambda p: Lion(p, 0.1), RANK_1, "(low rank; a loss of 2.8, dense 2.42): take AdamW or Muon with"),
        (lambda p: Adam(p), RANK_1, None),
        (lambda p: OurAdamW(p), RANK_1, None),
        (lambda p: FusedAdam(p), {}, "FusedAdam has not been shown to train"),
        (
            lambda p: FusedAdam(p),
            RANK_1,
            "FusedAdam has not been shown to train as well as dense",
        ),
        (lambda p: RMSprop(p), RANK_1, "RMSprop has not been shown"),
        (lambda p: Adagrad(p), RANK_1, "Adagrad has not been shown"),
        (
            lambda p: LagAdamW(p),
            {},
            "dense 2.27): take candidates='nominate' (2.41, with ahead() 2.33)",
        ),
        (lambda p: LagAdamW(p), NOMINATED, None),
        (lambda p: LagAdamW(p), RANK_1, None),
        (lambda p: SignSGD(p), {"residual_decay": 0.95}, None),
        (lambda p: SignSGD(p), {"candidates": "random"}, "optimizer='signsgd'), which sets residual_decay=0.95"),
        (lambda p: SignSGD(p), RANK_1, "SignSGD has not been shown"),
    ],
)
def test_warns_of_settings_that_hardly_train(
    inner: Callable[..., Optimizer],
    sketch: dict[str, Any] | LowRankConfig,
    message: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = sketch if isinstance(sketch, LowRankConfig) else little(**sketch)
    run_local(2, lambda t: DistributedOptimizer(inner(Toy().parameters()), None, config, t) and None, LIMIT_S)
    assert len(caplog.messages) == (message is not None), caplog.messages  # rank 0 speaks for all
    assert message is None or message in caplog.text


@pytest.mark.parametrize(
    ("config", "optimizer", "told"),
    [
        (LowRankConfig(ratio=500), AdamW, "ratios of up to 60, and this is 500: lower it"),
        (LowRankConfig(ratio=60), AdamW, None),
        (LowRankConfig(ratio=500), SGD, None),
        (SketchConfig.for_wire_ratio(800, 160_000, 2, candidates="random"), SGD, "ratios of up to 150, and this is 8"),
        (SketchConfig.for_wire_ratio(150, 160_000, 2, candidates="random"), SGD, None),
        (SketchConfig.for_wire_ratio(800, 160_000, 2, candidates="nominate"), SGD, None),
        (SketchConfig.for_wire_ratio(800, 160_000, 2, candidates="nominate"), LagAdamW, "up to 60, and this is 8"),
    ],
)
def test_warns_of_ratios_that_were_not_tried(
    config: SketchConfig | LowRankConfig, optimizer: Callable[..., Optimizer], told: str | None, caplog: Any
) -> None:
    DistributedOptimizer(optimizer([nn.Parameter(torch.zeros(400, 400))]), None, config, alone())
    assert len(caplog.messages) == (told is not None), caplog.messages
    assert told is None or told in caplog.text


def test_warns_where_small_tensors_take_most_of_the_bytes(caplog: Any) -> None:
    """Not where they take less than the others."""
    for biases, is_told in ((100, False), (3_000, True)):
        parameters = [nn.Parameter(torch.zeros(400, 400)), nn.Parameter(torch.zeros(biases))]
        config = SketchConfig.for_wire_ratio(100, 160_000, 2, candidates="nominate")
        DistributedOptimizer(SGD(parameters, lr=0.1), None, config, alone())
        assert len(caplog.messages) == is_told
    told = (
        "3000 of 163000 elements are in small tensors, which go dense: the others are sent in 107 times fewer bytes, "
    )
    assert f"{told}the whole model in 36.3." in caplog.text


@pytest.mark.parametrize(
    ("ratio", "candidates", "every", "told"),
    [
        (20, "nominate", 16, None),
        (
            100,
            "nominate",
            16,
            "SGD of LocalSteps has been shown to train after this exchange (nominate) at ratios of",
        ),
        (20, "sketch", 16, "take candidates='nominate' (2.41 with an exchange at 20 every 16 steps"),
        (100, "sketch", 1, None),
    ],
)
def test_warns_of_rounds_that_were_not_tried(
    ratio: float, candidates: Any, every: int, told: str | None, caplog: Any
) -> None:
    config = SketchConfig.for_wire_ratio(ratio, 160_000, 2, candidates=candidates)
    model = nn.Linear(400, 400, bias=False)
    outer = partial(SGD, lr=1.0)
    LocalSteps(Adam(model.parameters()), model.named_parameters(), config, alone(), every=every, outer=outer)
    assert len(caplog.messages) == (told is not None), caplog.messages
    assert told is None or told in caplog.text


@pytest.mark.parametrize("inner", [Adam, Momentous, lambda p: SGD(p, momentum=0.9), FusedAdam])
def test_momentum_before_and_after_is_refused(inner: Callable[..., Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"momentum is applied twice: \w+ has 0\.9 and the sketch 0\.5\."):
        DistributedOptimizer(inner(Toy().parameters()), None, little(momentum=0.5), alone())
