"""SketchConfig: what is out of range is refused at once, what is old is still taken."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from hvd_sketch import (
    DistributedOptimizer,
    LowRankConfig,
    SketchConfig,
    SketchedAllreduce,
    local_transports,
    recommended,
)


def test_sketch_in_backward_is_taken_with_a_warning_and_changes_nothing() -> None:
    with pytest.warns(DeprecationWarning, match="sketch_in_backward"):
        old = SketchConfig(cols=30, k=5, sketch_in_backward=True)
    assert old == SketchConfig(cols=30, k=5)
    assert "sketch_in_backward" not in asdict(replace(old, k=6))


NOT_NUMBERS: list[object] = ["3", None, True, [1], float("nan"), float("inf"), -1, torch.tensor(1.0)]
NOT_INTEGERS: list[object] = [*NOT_NUMBERS, 1.5]
NOT_FLAGS: list[object] = ["no", None, 1, 0.0]
NOT_BITS: list[object] = ["4", None, True, 4.0, 5, [4]]
SHARED: dict[str, list[object]] = {
    "weight_decay": NOT_NUMBERS,
    "seed": [value for value in NOT_INTEGERS if value != -1],
    "dense_below": NOT_INTEGERS,
    "deterministic": NOT_FLAGS,
    "value_bits": NOT_BITS,
}
OF_SKETCH: dict[str, list[object]] = {
    **SHARED,
    "k": [*NOT_INTEGERS, 0],
    "cols": [*NOT_INTEGERS, 0],
    "rows": [*NOT_INTEGERS, 0, 65, 10**6],
    "oversample": [*NOT_INTEGERS, 0],
    "momentum": [*NOT_NUMBERS, 1.0, 1],
    "residual_decay": [*NOT_NUMBERS, 1.5],
    "table_bits": NOT_BITS,
    "candidates": ["topk", None, 3, ["sketch"]],
}
OF_LOW_RANK: dict[str, list[object]] = {**SHARED, "rank": [*NOT_INTEGERS, 0]}
OF_OPTIMIZER: dict[str, list[object]] = {
    "backward_passes_per_step": [*NOT_INTEGERS, 0],
    "check_every": NOT_INTEGERS,
    "max_skips": NOT_INTEGERS,
    "gradient_predivide_factor": [*NOT_NUMBERS, 0],
    "num_groups": NOT_INTEGERS,
    "groups": [value for value in NOT_INTEGERS if value is not None],
    "sparse_as_dense": NOT_FLAGS,
    "op": ["max", True, 2.0, [0]],
    "compression": ["fp8", 3, True],
    "sketch": ["3", 20, True],
    "named_parameters": [3, "weight", [1]],
}


def bad(fields: dict[str, list[object]]) -> list[tuple[str, object]]:
    return [(name, value) for name, values in fields.items() for value in values]


@pytest.mark.parametrize(("name", "value"), bad(OF_SKETCH))
def test_bad_values_of_a_sketch(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        SketchConfig(**{"cols": 30, "k": 5, name: value})


@pytest.mark.parametrize(("name", "value"), bad(OF_LOW_RANK))
def test_bad_values_of_low_rank(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        LowRankConfig(**{"rank": 1, name: value})


@pytest.mark.parametrize("value", [*(value for value in NOT_NUMBERS if value is not None), 0])
def test_bad_ratios(value: object) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(40, 40))]
    for make in (
        lambda: LowRankConfig(ratio=value),
        lambda: SketchConfig.for_compression(value, 1000),
        lambda: SketchConfig.for_wire_ratio(value, 1000, 2),
        lambda: recommended(parameters, value, 2),
    ):
        with pytest.raises(ValueError, match="ratio must be positive and finite"):
            make()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_recommended_is_low_rank_where_the_ratio_leaves_every_matrix_rank_1(optimizer: Any) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(400, 400))]
    assert isinstance(recommended(parameters, 1000, 4, optimizer), LowRankConfig)


def test_recommended_beyond_rank_1_is_nominations_for_sgd_alone() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(400, 400))]
    beyond = recommended(parameters, 1450, 4)
    assert isinstance(beyond, SketchConfig) and beyond.candidates == "nominate"
    for optimizer in ("adam", "adamw", "muon"):
        with pytest.raises(ValueError, match=f"SignSGD .*'{optimizer}' trains worse") as raised:
            recommended(parameters, 1450, 4, optimizer)  # type: ignore[arg-type]
        highest = re.search(r"the highest ratio possible is ([\d.]+\d)", str(raised.value))
        assert highest is not None and 1000 < float(highest[1]) < 1450
        assert isinstance(recommended(parameters, float(highest[1]), 4, optimizer), LowRankConfig)  # type: ignore[arg-type]


def test_recommended_counts_all_where_low_rank_compresses_all() -> None:
    """Biases and norms travel in 4 bits: an eighth of their bytes."""
    matrix, biases = torch.nn.Parameter(torch.zeros(400, 400)), torch.nn.Parameter(torch.zeros(4_000))
    config = recommended([matrix, biases], 150, 4)
    assert isinstance(config, LowRankConfig) and config.dense_below == 0
    assert isinstance(recommended([biases], 7, 4), LowRankConfig)
    with pytest.raises(ValueError, match="there is nothing to compress, exchange dense"):
        recommended([torch.nn.Parameter(torch.zeros(2, 4))], 1, 4)
    nothing: list[list[torch.Tensor]] = [[], [torch.zeros(400, 400)]]
    for tensors in nothing:
        with pytest.raises(ValueError, match="there is nothing to compress, exchange dense"):
            recommended(tensors, 500, 4)
    of_coordinates: list[Any] = ["lagadamw", "signsgd"]
    for optimizer in of_coordinates:
        with pytest.raises(ValueError, match=r"none of 1 tensors .* has 512 elements.* nothing to compress"):
            recommended([biases], 7, 4, optimizer)


@pytest.mark.parametrize("ratio", [16, 350, 60_000])
def test_recommended_never_sends_more_than_rank_1(ratio: float) -> None:
    """Beside single coordinates biases go dense: of 400 bytes for each there is no coordinate to win back."""
    shapes = [(128, 4), (128,), (2, 128), (2,)] if ratio == 16 else [(400, 400), (4_000,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    with pytest.raises(ValueError, match=r"the highest ratio possible is ([\d.]+\d)") as raised:
        recommended(parameters, ratio, 4)
    told = str(raised.value)
    assert "SignSGD" not in told and ("With single coordinates" in told) == (ratio < 60_000)
    highest = float(re.findall(r"possible is ([\d.]+\d)", told)[0])
    assert highest < ratio and isinstance(recommended(parameters, highest, 4), LowRankConfig)


def test_recommended_for_a_sign_step_is_random_and_forgets() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(400, 400)), torch.nn.Parameter(torch.zeros(400))]
    config = recommended(parameters, 60, 4, "signsgd")
    assert isinstance(config, SketchConfig) and config.candidates == "random" and config.residual_decay == 0.95
    assert config.k < recommended(parameters, 40, 4, "signsgd").k  # type: ignore[union-attr]


def test_recommended_for_lag_adamw_is_nominated() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(400, 400)), torch.nn.Parameter(torch.zeros(400))]
    config, larger = (recommended(parameters, ratio, 4, "lagadamw") for ratio in (60, 40))
    assert isinstance(config, SketchConfig) and config.candidates == "nominate" and config.residual_decay == 1
    assert isinstance(larger, SketchConfig) and config.k < larger.k


@pytest.mark.parametrize("optimizer", ["lion", None, 3])
def test_recommended_for_other_optimizers_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="optimizer must be one of 'sgd', 'adam', 'adamw'"):
        recommended([torch.nn.Parameter(torch.zeros(40, 40))], 2, 2, optimizer)


@pytest.mark.parametrize(("name", "value"), bad(OF_OPTIMIZER))
def test_bad_arguments_of_the_optimizer(name: str, value: object) -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(ValueError, match=name):
        DistributedOptimizer(inner, transport=local_transports(1)[0], **{name: value})


@pytest.mark.parametrize(("k", "told"), [(10, False), (15, True), (30, True)])
def test_the_warning_of_candidates_is_true(k: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = SketchConfig.paper(cols=40, k=k, momentum=0.0)
    exchange = SketchedAllreduce(config, 60, local_transports(1)[0])
    assert caplog.text.count("every coordinate whose estimate is not zero") == told
    exchange._feedback.v.copy_(torch.arange(60.0))
    exchange.accumulate([torch.ones(60)])
    estimates = exchange._source.sketch.estimate()
    candidates = exchange._source.find(exchange._feedback.v, exchange._ranges)
    assert torch.equal(candidates, estimates.nonzero().flatten()) == told
