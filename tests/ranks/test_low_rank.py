"""Low-rank factors over the ranks: nothing is lost, all ranks hold the same bits, states go on, bytes as promised."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from io import BytesIO
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import DistributedOptimizer, LowRankAllreduce, LowRankConfig, Simulation
from hvd_sketch.exchange.agreement import Report
from hvd_sketch.exchange.base import Options
from hvd_sketch.model.gradients import GradientExchange
from hvd_sketch.transport import LocalTransport, Transport, local_transports, run_local
from tests.ranks.test_simulate import STEPS, Model, equal, real, simulate, sizes
from tests.support.worlds import register

SHAPES = [(30, 40), (16, 3, 3, 3), (2003,), (50, 1), (1, 64), (1,), (), (0, 5), (7, 5)]
DIM = sum(map(prod, SHAPES))
LIMIT_S = 120
every_width = pytest.mark.parametrize("bits", [4, 8, 16, 32])
ranked = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


def gradient(rank: int, step: int, dim: int = DIM) -> Tensor:
    random = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(dim, generator=random) * torch.rand(dim, generator=random) ** 3


def build(transport: Transport, **settings: Any) -> LowRankAllreduce:
    options: Options = {"shapes": SHAPES}
    if "shapes" in settings:
        options["shapes"] = settings.pop("shapes")
    dim = sum(map(prod, options["shapes"]))
    return LowRankAllreduce(LowRankConfig(**{"rank": 3, **settings}), dim, transport, **options)


def span(number: int) -> tuple[int, int]:
    """Where a tensor of SHAPES begins and ends."""
    start = sum(map(prod, SHAPES[:number]))
    return start, start + prod(SHAPES[number])


@every_width
@ranked
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_nothing_is_lost(ranks: int, bits: int) -> None:
    """Some are skipped; in some a tensor is unused, or two adjacent ones, or parts of two."""
    steps = 200 if bits == 4 else 50
    unused = {1: [span(0)], 2: [span(1), span(4)], 3: [(span(2)[0], span(3)[1])], 4: [(1100, 1300)]}

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        exchange = build(transport, value_bits=bits)
        sent, produced = torch.zeros(2, DIM, dtype=torch.float64)
        for step in range(steps):
            own = gradient(transport.rank, step)
            if step % 7 == 6:
                own[step] = float("nan") if transport.rank == ranks - 1 else 1.0
                assert exchange.step(own).skipped
                continue
            ranges = unused.get(step % 7, [])
            before = exchange.residual.clone()
            assert exchange.begin_step(Report()).goes_on
            exchange.accumulate([own[:700], own[700:]], unused=ranges)
            update = exchange.agree()
            assert update.indices is None and not update.skipped
            for start, stop in ranges:
                own[start:stop] = 0
                assert not update.values[start:stop].any()
                assert torch.equal(exchange.residual[start:stop], before[start:stop])
            produced += own
            sent += update.values.double() * ranks
        assert exchange.step_number == steps
        return sent, exchange.residual.double(), produced

    results = run_local(ranks, main, LIMIT_S)
    sent = results[0][0]
    assert all(torch.equal(own, sent) for own, _, _ in results), "the ranks differ"
    kept, produced = (sum(result[i] for result in results) for i in (1, 2))
    assert float((sent + kept - produced).abs().max()) <= steps * 1e-6
    assert float(kept.norm()) < 0.9 * float(produced.norm()), "most of it must be sent"


@pytest.mark.parametrize("ranks", [1, 3])
def test_nothing_of_an_unused_tensor_is_sent(ranks: int) -> None:
    def main(transport: LocalTransport) -> None:
        exchange = build(transport)
        rights = exchange.state_dict()["right"][: 3 * 40]
        exchange.accumulate([gradient(transport.rank, 0)], unused=[span(0)])
        exchange.agree()
        assert torch.equal(exchange.state_dict()["right"][: 3 * 40], rights)
        before = exchange.ledger.totals().payload_bytes
        exchange.accumulate([gradient(transport.rank, 1)], unused=[(0, DIM)])
        assert not exchange.agree().values.any()
        assert exchange.ledger.totals().payload_bytes == before

    run_local(ranks, main, LIMIT_S)


@every_width
def test_goes_on_from_its_state_to_the_bit(bits: int) -> None:
    def main(transport: LocalTransport) -> None:
        whole, first, second = (build(transport, value_bits=bits) for _ in range(3))
        for step in range(4):
            whole.step(gradient(transport.rank, step))
            first.step(gradient(transport.rank, step))
        second.load_state_dict(first.state_dict())
        assert second.step_number == 4
        for step in range(4, 8):
            own = gradient(transport.rank, step) * (step != 5)  # zeros: columns are drawn
            assert torch.equal(second.step(own).values, whole.step(own).values)
        assert torch.equal(second.residual, whole.residual)
        with pytest.raises(ValueError, match=r"other matrices: .*\(30, 40, 3\).* there, .*\(30, 40, 2\)"):
            build(transport, rank=2).load_state_dict(first.state_dict())

    run_local(3, main, LIMIT_S)


def test_an_optimizer_goes_on_from_a_file() -> None:
    torch.manual_seed(0)  # not on the ranks: threads share torch's generator
    initial = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))

    def train(transport: LocalTransport, resumes: bool) -> list[Tensor]:
        model = deepcopy(initial)

        def wrapped() -> DistributedOptimizer:
            inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            return DistributedOptimizer(inner, model.named_parameters(), LowRankConfig(ratio=20.0), transport)

        optimizer = wrapped()
        for step in range(6):
            if step == 3 and resumes:
                file = BytesIO()
                torch.save(optimizer.state_dict(), file)
                optimizer = wrapped()
                optimizer.load_state_dict(torch.load(BytesIO(file.getvalue())))
            optimizer.zero_grad()
            model(gradient(transport.rank, step, 640).view(10, 64)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    whole, resumed = (run_local(2, partial(train, resumes=resumes), LIMIT_S) for resumes in (False, True))
    for ours, theirs in zip(whole + whole[:1], resumed + resumed[1:], strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("others_are_fresh", [True, False])
def test_a_consolidated_state_goes_on_at_another_world_size(others_are_fresh: bool) -> None:
    def save(transport: LocalTransport) -> tuple[dict[str, Any], Tensor]:
        exchange = build(transport)
        for step in range(3):
            exchange.step(gradient(transport.rank, step))
        return exchange.state_dict(consolidated=True), exchange.residual.clone()

    saved = run_local(2, save, LIMIT_S)
    state = saved[0][0]
    assert all(torch.equal(own["v"], state["v"]) and torch.equal(own["right"], state["right"]) for own, _ in saved)
    assert torch.allclose(state["v"], (saved[0][1] + saved[1][1]) / 2, atol=1e-6)

    def load(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        exchange = build(transport)
        if transport.rank == 1 or not others_are_fresh:
            exchange.load_state_dict(state)
        update = exchange.step(gradient(0, 3))
        assert exchange.step_number == 4
        return update.values, exchange.residual.clone(), exchange.state_dict()["right"]

    results = run_local(3, load, LIMIT_S)
    assert all(torch.equal(own[0], results[0][0]) and torch.equal(own[2], results[0][2]) for own in results)
    kept = sum(residual for _, residual, _ in results) / 3
    assert torch.allclose(results[0][0] + kept, state["v"] + gradient(0, 3), atol=1e-5)


@ranked
def test_full_rank_in_32_bits_is_the_mean(ranks: int) -> None:
    shapes = [(20, 31), (31, 20), (400,), (10, 2, 3)]
    dim = sum(map(prod, shapes))

    def main(transport: LocalTransport) -> Tensor:
        exchange = build(transport, rank=1000, value_bits=32, shapes=shapes)
        update = exchange.step(gradient(transport.rank, 0, dim)).values
        assert float(exchange.residual.abs().max()) < 1e-3 or ranks > 1
        return update

    mean = sum(gradient(rank, 0, dim) for rank in range(ranks)) / ranks
    for update in run_local(ranks, main, LIMIT_S):
        assert torch.allclose(update, mean, atol=1e-4)


def test_other_shapes_of_as_many_coordinates_are_another_exchange() -> None:
    def main(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match="shapes"):
            build(transport, shapes=[(20, 30), (5,)][:: 1 - 2 * transport.rank])

    run_local(2, main, LIMIT_S)


def test_without_shapes_the_vector_is_one_tensor() -> None:
    def main(transport: LocalTransport) -> None:
        for dim, matrix in ((2003, (1, 2003, 1)), (70_000, (265, 265, 2))):
            exchange = LowRankAllreduce(LowRankConfig(rank=2), dim, transport)
            exchange.step(gradient(transport.rank, 0, dim))
            assert exchange.state_dict()["matrices"] == [matrix]

    run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("ranks", [1, 3])
def test_vectors_go_whole(ranks: int) -> None:
    shapes = [(300,), (1,), (40, 1)]

    def main(transport: LocalTransport) -> tuple[Tensor, int, list[str]]:
        config = LowRankConfig(rank=1, value_bits=32)
        exchange = LowRankAllreduce(config, 341, transport, shapes=shapes)
        update = exchange.step(gradient(transport.rank, 0, 341))
        assert not exchange.residual.any() and exchange.state_dict()["right"].numel() == 0
        phases = [record.phase for record in exchange.ledger.records]
        return update.values, exchange.ledger.totals().wire_bytes, phases

    results = run_local(ranks, main, LIMIT_S)
    mean = sum(gradient(rank, 0, 341) for rank in range(ranks)) / ranks
    for values, _, phases in results:
        assert torch.allclose(values, mean, rtol=1e-5, atol=1e-6)
        assert "left" not in phases and phases.count("right") == 1


def test_an_update_that_is_kept_keeps_its_memory() -> None:
    exchange = build(local_transports(1)[0])
    kept = exchange.step(gradient(0, 0)).values[5:]
    before = kept.clone()
    place = exchange.step(gradient(0, 1)).values.data_ptr()
    assert torch.equal(kept, before)
    assert exchange.step(gradient(0, 2)).values.data_ptr() == place


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_and_collectives_of_a_step(ranks: int) -> None:
    shapes = [(300, 400), (64, 32, 3, 3), (20_000,), (1000, 64)]

    def main(transport: LocalTransport) -> tuple[float, list[str], float]:
        exchange = build(transport, rank=None, ratio=60, shapes=shapes)
        for step in range(3):
            exchange.step(gradient(transport.rank, step, exchange.dim))
        phases = [record.phase for record in exchange.ledger.records if record.step == 2]
        return exchange.ledger.compression_ratio(), phases, exchange.ledger.paper_compression_ratio()

    for ratio, phases, paper_ratio in run_local(ranks, main, LIMIT_S):
        assert 0.95 * 60 <= ratio <= 1.1 * 60
        assert 60 <= paper_ratio <= 70  # without scales
        assert phases == ["agree", "left", "left sums", "right", "right sums"]


@ranked
def test_nothing_is_lost_of_values_near_the_largest_float(ranks: int) -> None:
    """What a step cannot send stays; no rank gets NaN from another."""

    def main(transport: LocalTransport) -> tuple[Tensor, Tensor, Tensor]:
        exchange = build(transport, shapes=[(20, 30), (25, 4)])
        sent, produced = torch.zeros(2, 700, dtype=torch.float64)
        for step in range(100):
            own = gradient(transport.rank, step, 700)
            if step == 1 and transport.rank == ranks - 1:
                own[:100] = 2.0**127
                own[600:610] = -(2.0**125)
            update = exchange.step(own)
            assert not update.skipped and bool(torch.isfinite(update.values).all())
            assert bool(torch.isfinite(exchange.residual).all())
            produced += own
            sent += update.values.double() * ranks
        assert exchange.reset_coordinates == 0
        return sent, exchange.residual.double(), produced

    results = run_local(ranks, main, LIMIT_S)
    assert all(torch.equal(own[0], results[0][0]) for own in results)
    kept, produced = (sum(result[i] for result in results) for i in (1, 2))
    assert float((results[0][0] + kept - produced).abs().max()) <= 1e-4 * 2.0**127
    assert float(kept.abs().max()) < 0.5 * 2.0**127, "it must be sent in time"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_residual_that_overflowed_is_reset_and_counted(ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    def main(transport: LocalTransport) -> int:
        exchange = build(transport)
        is_last = transport.rank == ranks - 1
        if is_last:
            exchange.residual[40:43] = torch.tensor([float("nan"), float("inf"), 3e38])
        own = gradient(transport.rank, 0)
        own[42] = 3e38
        assert bool(torch.isfinite(exchange.step(own).values).all())
        for step in range(1, 20):
            assert bool(torch.isfinite(exchange.step(gradient(transport.rank, step)).values).all())
        assert bool(torch.isfinite(exchange.residual).all())
        return exchange.reset_coordinates

    counts = run_local(ranks, main, LIMIT_S)
    assert counts[:-1] == [0] * (ranks - 1) and counts[-1] == 3
    assert "momentum or residual was NaN or infinite at 3 coordinates (coordinate 40" in caplog.text


@ranked
@pytest.mark.parametrize("operation", ["average", "sum"])
def test_updates_fit_the_parameters_dtypes(operation: str, ranks: int) -> None:
    """What does not fit float16 comes in later steps."""

    def main(transport: LocalTransport) -> Tensor:
        model = nn.ParameterList([torch.zeros(30, 40), torch.zeros(50, 40, dtype=torch.float16)])
        config = LowRankConfig(rank=4, value_bits=8, dense_below=10)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = DistributedOptimizer(inner, None, config, transport, op=operation)
        totals = torch.zeros(2, 40, dtype=torch.float64)
        for step in range(40):
            for parameter in model:
                parameter.grad = torch.zeros_like(parameter)
                if step < 6:
                    parameter.grad[3] = 40_000.0
            optimizer.step()
            for number, parameter in enumerate(model):
                assert bool(torch.isfinite(parameter.grad).all())
                totals[number] += parameter.grad[3].double()
        return totals

    scale = ranks if operation == "sum" else 1
    for totals in run_local(ranks, main, LIMIT_S):
        assert torch.allclose(totals / (6 * 40_000.0 * scale), torch.ones_like(totals), rtol=2e-2)


@ranked
@pytest.mark.parametrize("settings", [{"rank": 2}, {"ratio": 3.0, "value_bits": 8}, {"rank": 3, "value_bits": 32}])
def test_simulated_ranks_equal_real_ones(settings: dict[str, Any], ranks: int) -> None:
    config = LowRankConfig(deterministic=True, seed=7, dense_below=100, weight_decay=0.1, **settings)
    results = run_local(ranks, lambda transport: real(transport, 1013, config), LIMIT_S)
    model = Model(1013)
    simulation = Simulation(model.named_parameters(), config, ranks)
    simulation.ledger.records = type(simulation.ledger.records)()
    assert equal(simulate(simulation, model, range(STEPS)), results[0][0])
    for exchanges, (_, _, residuals) in zip(simulation._exchanges, results, strict=True):
        assert all(torch.equal(own.residual, kept) for own, kept in zip(exchanges, residuals, strict=True))
    assert sizes(simulation.ledger) == sizes(results[0][1])


def test_refusals() -> None:
    def main(transport: LocalTransport) -> None:
        with pytest.raises(ValueError, match="what the shapes hold, 12, got 13"):
            LowRankAllreduce(LowRankConfig(rank=1), 13, transport, shapes=[(3, 4)])
        with pytest.raises(ValueError, match="the highest ratio possible is"):
            build(transport, rank=None, ratio=1000.0)
        with pytest.raises(ValueError, match=r"config\.rank"):
            build(transport, rank=2 + transport.rank)
        model = nn.Linear(64, 64)
        with pytest.raises(ValueError, match="the highest ratio possible is"):
            GradientExchange(list(model.named_parameters()), LowRankConfig(ratio=1000.0), transport)

    run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("bits", [4, 32])
def test_solves_a_regression_whose_directions_differ_a_hundredfold(bits: int) -> None:
    """On data that differ between the ranks; with momentum in the wrapped optimizer."""
    ranks, steps = 4, 300
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, 40)  # of the inputs: curvatures differ by their squares
    target = torch.randn(30, 40, generator=random)
    inputs = torch.randn(ranks, 200, 40, generator=random) * scales + 0.2 * torch.randn(ranks, 1, 40, generator=random)

    def main(transport: LocalTransport) -> tuple[float, float, Tensor]:
        model = nn.Linear(40, 30, bias=False)
        nn.init.zeros_(model.weight)
        config = LowRankConfig(rank=4, value_bits=bits, dense_below=0)
        inner = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), config, transport)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            own = inputs[transport.rank]
            loss = (model(own) - own @ target.T).square().sum(1).mean()
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        return losses[0], losses[-1], model.weight.detach()

    results = run_local(ranks, main, LIMIT_S)
    assert all(torch.equal(weight, results[0][2]) for _, _, weight in results)
    assert sum(last for _, last, _ in results) < 1e-4 * sum(first for first, _, _ in results)


def run_steps(transport: Transport) -> dict[str, Any]:
    """A few steps on one rank of any transport."""
    exchange = build(transport, deterministic=True)
    updates = [exchange.step(gradient(transport.rank, step)).values for step in range(10)]
    return {"updates": updates, "residual": exchange.residual, "right": exchange.state_dict()["right"]}


MPI_RANKS = 3
MPI_JOB = register("mpi", MPI_RANKS, "tests.ranks.test_low_rank:run_steps")


@pytest.mark.multiprocess
def test_processes_equal_threads() -> None:
    for ours, local in zip(MPI_JOB.results(), run_local(MPI_RANKS, run_steps, LIMIT_S), strict=True):
        assert all(map(torch.equal, ours["updates"], local["updates"]))
        assert torch.equal(ours["residual"], local["residual"]) and torch.equal(ours["right"], local["right"])
