"""Values that no float holds: what fits is sent, nothing else is lost, and training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_sketch import DistributedOptimizer, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.feedback import Feedback, Limits
from hvd_sketch.transport import LocalTransport, run_local

LIMIT_S = 60
RANKS = [1, 2, 3, 4]
SETTINGS: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"candidates": "heavymix"}, {"deterministic": True}]


def config(**settings: Any) -> SketchConfig:
    return SketchConfig.paper(**{"cols": 100, "k": 10, "momentum": 0.0, **settings})


# Every number of ranks with every setting elsewhere: 400 steps take long.
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [*((ranks, {}) for ranks in RANKS), (2, {"candidates": "heavymix"}), (3, {"deterministic": True})],
)
def test_nothing_is_lost_of_values_near_the_largest_float(ranks: int, settings: dict[str, Any]) -> None:
    """Powers of two: their sums are exact. 40 coordinates at once, beyond every k."""

    def main(transport: LocalTransport) -> torch.Tensor:
        exchange = SketchedAllreduce(config(**settings), 1000, transport)
        sent = torch.zeros(1000, dtype=torch.float64)
        for step in range(400):
            gradient = torch.zeros(1000)
            if step == 0:
                gradient[::25] = 2.0**127
            update = exchange.step(gradient)
            sent[update.indices] += update.values.double()
            assert not update.skipped and bool(torch.isfinite(exchange.residual).all())
        assert exchange.skipped_steps == exchange.reset_coordinates == 0
        return sent + sum(transport.allgather(exchange.residual.double().unsqueeze(0))) / ranks

    for produced in run_local(ranks, main, LIMIT_S):
        expected = torch.zeros(1000, dtype=torch.float64)
        expected[::25] = 2.0**127
        torch.testing.assert_close(produced, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_overflows_in_the_residual_is_reset_counted_and_named_once(
    ranks: int, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Twice the largest float within one residual, on the last rank only."""

    def main(transport: LocalTransport) -> tuple[int, float, torch.Tensor]:
        exchange = SketchedAllreduce(config(**settings), 1000, transport)
        is_last = transport.rank == ranks - 1
        for step in range(30):
            gradient = torch.zeros(1000)
            gradient[500 + 3 * (step % 50)] = 1.0
            if step < 2 and is_last:
                gradient[:40] = 3e38
            update = exchange.step(gradient)
            assert not update.skipped and bool(torch.isfinite(update.values).all())
        return exchange.reset_coordinates, float(exchange.residual.abs().max()), exchange.velocity

    results = run_local(ranks, main, LIMIT_S)
    if settings.get("candidates") != "heavymix":  # which draws coordinates by chance: some leave before they overflow
        assert [reset > 0 for reset, _, _ in results] == [rank == ranks - 1 for rank in range(ranks)]
        (told,) = caplog.messages
        assert f"rank {ranks - 1}: momentum or residual was NaN or infinite at " in told and "(coordinate " in told
    for _, largest, velocity in results:
        assert largest < float("inf") and bool(torch.isfinite(velocity).all())


@pytest.mark.parametrize("consolidated", [False, True])
def test_what_overflowed_is_mended_before_it_is_saved(consolidated: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint is finite, and goes on as the training would have gone on."""

    def main(transport: LocalTransport) -> None:
        exchange, other = (SketchedAllreduce(config(momentum=0.5), 1000, transport) for _ in range(2))
        exchange.step(torch.arange(1000.0))
        if transport.rank == 0:
            exchange.residual[7], exchange.velocity[[8, 900]] = float("inf"), float("nan")
        other.load_state_dict(exchange.state_dict(consolidated))
        assert exchange.reset_coordinates == 3 * (transport.rank == 0)
        if not consolidated:
            update, again = (each.step(torch.ones(1000)) for each in (exchange, other))
            assert torch.equal(update.indices, again.indices) and torch.equal(update.values, again.values)

    run_local(3, main, LIMIT_S)
    assert len(caplog.messages) == 1 and "momentum or residual was NaN or infinite" in caplog.text


def test_a_mean_of_residuals_whose_sum_overflows_is_saved() -> None:
    def main(transport: LocalTransport) -> None:
        exchange = SketchedAllreduce(config(), 1000, transport)
        exchange.residual.fill_(3e38)
        torch.testing.assert_close(exchange.state_dict(consolidated=True)["v"], torch.full((1000,), 3e38))

    run_local(3, main, LIMIT_S)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("operation", ["average", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_fit_the_parameters_dtypes(dtype: torch.dtype, operation: str, ranks: int) -> None:
    """Mixed with a float32 parameter; what does not fit float16 comes in later steps."""
    value = 40_000.0 if dtype == torch.float16 else 2.0**126

    def main(transport: LocalTransport) -> tuple[list[float], int]:
        model = nn.ParameterList([torch.zeros(30, 40), torch.zeros(50, 40, dtype=dtype), torch.zeros(10, dtype=dtype)])
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            None,
            config(dense_below=10, cols=300),
            transport,
            op=operation,
        )
        totals = torch.zeros(2, dtype=torch.float64)
        for step in range(60):
            optimizer.zero_grad()
            for parameter in model:
                parameter.grad = torch.zeros_like(parameter)
                if step < 6:
                    parameter.grad.view(-1)[:5] = value
            optimizer.step()
            for parameter in model:
                assert bool(torch.isfinite(parameter.grad).all())
            totals += torch.stack([model[i].grad.double().sum() for i in range(2)])
        return totals.tolist(), optimizer.skipped_steps

    scale = ranks if operation == "sum" else 1
    for (wide, narrow), skipped in run_local(ranks, main, LIMIT_S):
        assert skipped == 0
        assert wide == pytest.approx(30 * value * scale, rel=1e-2)
        assert narrow == pytest.approx(30 * value * scale, rel=2e-2)


@pytest.mark.parametrize(("dtype", "options"), [(torch.bfloat16, {}), (torch.float32, {"compression": "bf16"})])
def test_a_mean_in_16_bits_is_right_where_the_sum_overflows(dtype: torch.dtype, options: dict[str, Any]) -> None:
    def main(transport: LocalTransport) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = DistributedOptimizer(torch.optim.SGD([parameter], lr=0.0), None, transport=transport, **options)
        parameter.grad = torch.full_like(parameter, [2e38, 2e38, -2e38][transport.rank])
        parameter.grad[1] = torch.finfo(torch.bfloat16).max
        optimizer.step()
        return parameter.grad.float()

    for gradient in run_local(3, main, LIMIT_S):
        assert gradient[1] == torch.finfo(torch.bfloat16).max
        assert gradient[0] == gradient[2] == pytest.approx(2e38 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "options", "value"),
    [
        (torch.float32, {"compression": "fp16"}, 1e6),
        (torch.float32, {"compression": "fp16"}, 6e4),
        (torch.float16, {"op": "sum"}, 6e4),
        (torch.float16, {"op": "sum"}, 1e4),
    ],
)
def test_what_a_dense_gradient_loses_is_told_once(
    dtype: torch.dtype, options: dict[str, Any], value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def main(transport: LocalTransport) -> float:
        parameter = nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = DistributedOptimizer(torch.optim.SGD([parameter], lr=0.0), None, transport=transport, **options)
        for _ in range(3):
            parameter.grad = torch.full_like(parameter, value)
            optimizer.step()
        return float(parameter.grad[0]) if parameter.grad is not None else 0.0

    whole = 4 * value if "op" in options else value
    limited = run_local(4, main, LIMIT_S)[0]
    assert limited == pytest.approx(min(whole, 65504.0), rel=1e-3)
    assert caplog.text.count("does not fit its float16") == (4 if whole > 65504 else 0), "once on each rank"


def test_an_offer_is_cut_and_what_is_cut_stays() -> None:
    limits = Limits(torch.tensor([4, 10]), torch.tensor([100.0, 1e9]))
    feedback = Feedback(10, 0.5, "cpu", size=2, limits=limits)
    gradient = torch.tensor([150.0, -250.0, 50.0, 1.0, 150.0, 3e9, 0.0, 0.0, -2e9, 5.0])
    feedback.add_(gradient)
    indices = torch.tensor([0, 1, 4, 5, 8])
    offered = torch.empty(5)
    assert feedback.offer(indices, offered)
    assert offered.tolist() == [100.0, -100.0, 150.0, 1e9, -1e9]
    feedback.clear_(torch.tensor([1, 4, 8]))  # the others were not chosen
    assert feedback.v.tolist() == [150.0, -150.0, 50.0, 1.0, 0.0, 3e9, 0.0, 0.0, -1e9, 5.0]
    assert feedback.u[[1, 4, 8]].tolist() == [0.0] * 3
    assert feedback.offer(torch.tensor([2]), torch.empty(1))
    feedback.clear_(torch.tensor([2]))
    assert feedback.v[2] == 0
