"""The exchange: equal to the paper's algorithm, nothing lost, the same decision on every rank."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_sketch.config import SketchConfig
from hvd_sketch.exchange import DenseAllreduce, SketchedAllreduce
from hvd_sketch.exchange.threshold import ThresholdPredictor
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.plain import PlainSketchedSGD
from tests.support.targets import float_gradient, integer_gradient, run_steps

# dim, config: odd sizes, cols below the block, few coordinates for many ranks, every coordinate a candidate
CASES: list[tuple[int, dict[str, Any]]] = [
    (785, {"rows": 7, "cols": 40, "k": 10, "oversample": 10}),
    (1009, {"rows": 2, "cols": 61, "k": 7, "seed": 5}),
    (3, {"rows": 1, "cols": 4, "k": 1, "oversample": 2}),
    (2, {"rows": 3, "cols": 5, "k": 2, "oversample": 1}),
    (5000, {"rows": 4, "cols": 333, "k": 100, "oversample": 3, "deterministic": True}),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "settings"), CASES)
def test_equals_the_plain_algorithm(dim: int, settings: dict[str, Any], ranks: int) -> None:
    settings = {**settings, "momentum": 0.0}
    plain = PlainSketchedSGD(SketchConfig.paper(**settings), dim, ranks)
    results = run_local(ranks, lambda t: run_steps(t, dim, 6, settings, integers=True))
    for step in range(6):
        expected = plain.step([integer_gradient(dim, rank, step).tolist() for rank in range(ranks)])
        for result in results:
            assert result["indices"][step].tolist() == list(expected)
            assert torch.equal(result["values"][step], torch.tensor(list(expected.values())))
    for result, v in zip(results, plain.v, strict=True):
        assert result["residual"].tolist() == v


@pytest.mark.parametrize("ranks", [1, 3])
def test_momentum_and_masking(ranks: int) -> None:
    """u <- m u + g, v <- v + u, and both are zero where the update was sent."""
    dim, settings = 501, {"cols": 90, "k": 20, "momentum": 0.5}
    results = run_local(ranks, lambda t: run_steps(t, dim, 3, settings))
    for rank, result in enumerate(results):
        u = v = torch.zeros(dim)
        for step in range(3):
            u = 0.5 * u + float_gradient(dim, rank, step)
            v = v + u
            keep = torch.ones(dim)
            keep[result["indices"][step]] = 0
            u, v = u * keep, v * keep
        assert torch.equal(result["velocity"], u) and torch.equal(result["residual"], v)


def test_every_rank_gets_the_same_bits() -> None:
    for ranks in (2, 3, 4):
        results = run_local(ranks, lambda t: run_steps(t, 4001, 5, {"cols": 500, "k": 100}))
        for result in results[1:]:
            for name in ("indices", "values"):
                assert all(map(torch.equal, result[name], results[0][name]))


def test_chosen_are_the_largest_exact_sums() -> None:
    """With a table wide enough that estimates are nearly exact, the update is the true top-k of the sum."""
    dim, ranks = 400, 3
    results = run_local(ranks, lambda t: run_steps(t, dim, 1, {"rows": 5, "cols": 60_000, "k": 25}))
    total = sum(float_gradient(dim, rank, 0) for rank in range(ranks))
    expected = total.abs().topk(25).indices.sort().values
    assert torch.equal(results[0]["indices"][0], expected)
    torch.testing.assert_close(results[0]["values"][0], total[expected] / ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_threshold_that_is_expected_decides_nothing(ranks: int) -> None:
    """It saves a collective, and where too few sums lie above it costs one, as when gradients shrink."""
    config, dim = SketchConfig.paper(cols=60_000, k=1000, momentum=0.0), 20_000
    sizes = (1.0, 1.0, 1.0, 1.0, 1e-3, 1e-3, 1e-3, 1e3)

    def main(transport: LocalTransport, knows: bool) -> tuple[list[tuple[int, int]], list[Tensor]]:
        exchange = SketchedAllreduce(config, dim, transport)
        counts, updates = [], []
        for size in sizes:
            if not knows:
                exchange._predictor = ThresholdPredictor()
            update = exchange.step(float_gradient(dim, transport.rank, 0) * size)
            updates += [update.indices, update.values]
            exchange.residual.zero_()  # so that sums are as large as gradients
            phases = exchange.ledger.by_phase()
            counts.append(tuple(phases[name].collectives for name in ("choose", "values")))
        return counts, updates

    knowing = run_local(ranks, lambda transport: main(transport, True))
    ignorant = run_local(ranks, lambda transport: main(transport, False))
    for counts, updates in knowing:
        assert all(map(torch.equal, updates, ignorant[0][1])) and counts == knowing[0][0]
    chosen, sent = zip(*knowing[0][0], strict=True)
    assert chosen[3] == chosen[0] and sent[:4] == (1, 2, 3, 4), "expected: nothing is looked for"
    assert chosen[4] > chosen[3] and sent[4] == 6, "not expected: it is looked for, and sums travel twice"


def test_a_zero_sum_is_dropped_and_keeps_its_residual() -> None:
    """Ranks cancel at coordinate 5, whose estimate is not zero because coordinate 0 collides with it."""

    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(rows=1, cols=2, k=2, oversample=5, momentum=0.0), 10, transport)
        gradient = torch.zeros(10)
        gradient[5] = 3.0 if transport.rank == 0 else -3.0
        gradient[0] = 1.0
        return exchange.step(gradient), exchange.residual.clone()

    for rank, (update, residual) in enumerate(run_local(2, main)):
        assert update.indices.tolist() == [0] and update.values.tolist() == [1.0]
        assert residual[5] == (3.0 if rank == 0 else -3.0)


def test_all_zero_gradients_send_nothing() -> None:
    def main(transport):
        return SketchedAllreduce(SketchConfig.paper(cols=30, k=5), 100, transport).step(torch.zeros(100))

    for update in run_local(3, main):
        assert update.indices.numel() == update.values.numel() == 0 and not update.skipped


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_rank_with_a_bad_gradient_makes_all_skip(bad: float) -> None:
    dim = 300

    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=60, k=10), dim, transport)
        exchange.step(float_gradient(dim, transport.rank, 0))
        u, v = exchange.velocity.clone(), exchange.residual.clone()
        broken = float_gradient(dim, transport.rank, 1)
        if transport.rank == 1:
            broken[7] = bad
        skipped = [exchange.step(broken), exchange.step(broken)]
        same = torch.equal(u, exchange.velocity) and torch.equal(v, exchange.residual)
        return skipped, same, exchange.step(float_gradient(dim, transport.rank, 2)), exchange.skipped_steps

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = run_local(3, main)
    for skipped, same, after, count in results:
        assert all(u.skipped and u.indices.numel() == u.values.numel() == 0 for u in skipped)
        assert same and count == 2 and not after.skipped and after.indices.numel() == 10
    told = [str(w.message) for w in caught if "NaN or Inf" in str(w.message)]
    assert len(told) == 3 and all("rank 1" in text for text in told)  # once on each of the three ranks


def test_a_verdict_from_elsewhere_makes_all_skip() -> None:
    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=60, k=10), 300, transport)
        return exchange.step(torch.ones(300), finite=transport.rank != 0)

    with pytest.warns(RuntimeWarning, match="rank 0"):
        assert all(update.skipped for update in run_local(2, main))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_of_a_sum_that_overflows_what_fits_is_sent_and_the_rest_stays(ranks: int) -> None:
    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(rows=1, cols=66, k=2, momentum=0.0), 64, transport)
        gradient = torch.zeros(64)
        gradient[3] = 3e38
        sent, steps = torch.zeros((), dtype=torch.float64), 0
        while steps == 0 or bool(exchange.residual.any()):
            update = exchange.step(gradient if steps == 0 else torch.zeros(64))
            assert update.indices.tolist() == [3] and bool(torch.isfinite(update.values).all())
            sent += update.values[0].double()
            steps += 1
        return sent, steps, exchange.skipped_steps, exchange.reset_coordinates

    for sent, steps, skipped, reset in run_local(ranks, main):
        assert steps == (1 if ranks == 1 else ranks) and skipped == reset == 0
        assert sent == pytest.approx(3e38, rel=1e-6)


def test_different_setups_raise_on_every_rank() -> None:
    def build(transport, config, dim=100, parameters=(("w", (10, 10), "float32"),)):
        try:
            SketchedAllreduce(config, dim, transport, parameters=parameters)
        except ValueError as error:
            return str(error)
        return ""

    base = SketchConfig.paper(cols=30, k=5)

    def odd(**changes):
        return lambda t: build(t, **({"config": base} if t.rank != 1 else {"config": base, **changes}))

    for wrong, told in [
        (odd(config=SketchConfig.paper(cols=30, k=6)), "config.k: 5 on ranks 0, 2; 6 on rank 1"),
        (odd(config=SketchConfig.paper(cols=30, k=5, seed=1)), "config.seed: 0 on ranks 0, 2; 1 on rank 1"),
        (odd(dim=101), "dim: 100 on ranks 0, 2; 101 on rank 1"),
        (odd(parameters=(("v", (10, 10), "float32"),)), "parameter 0: w (10, 10) float32 on ranks 0, 2; v"),
        (odd(parameters=(("w", (100,), "float32"),)), "w (100,) float32 on rank 1"),
        (odd(parameters=(("w", (10, 10), "float16"),)), "float16 on rank 1"),
        (odd(parameters=()), "missing on rank 1"),
    ]:
        errors = run_local(3, wrong, timeout_s=20)
        assert all(told in error for error in errors), errors


def test_a_different_hash_version_raises_on_every_rank(monkeypatch) -> None:
    from hvd_sketch.exchange import base as steps

    class ByRank(int):  # a version that reads differently on each thread
        def __str__(self) -> str:
            import threading

            return threading.current_thread().name

    monkeypatch.setattr(steps, "HASH_VERSION", ByRank())

    def main(transport):
        with pytest.raises(ValueError, match="hash version"):
            SketchedAllreduce(SketchConfig.paper(cols=30, k=5), 100, transport)
        return True

    assert all(run_local(2, main))


def test_impossible_settings_are_refused_on_every_rank() -> None:
    def main(transport, config, message, dim=50):
        with pytest.raises(ValueError, match=message):
            SketchedAllreduce(config, dim, transport)
        return True

    assert run_local(2, lambda t: main(t, SketchConfig.paper(cols=10, k=51), "k must be at most dim"))
    assert run_local(3, lambda t: main(t, SketchConfig.paper(cols=2, k=5), "cols must be at least 1 for each of the 3"))
    assert run_local(2, lambda t: main(t, SketchConfig.paper(cols=10, k=5), "dim", dim=0))
    exchange = SketchedAllreduce(SketchConfig.paper(cols=10, k=5), 50, local_one())
    for wrong in (torch.ones(49), torch.ones(50, dtype=torch.float64), torch.ones(5, 10)):
        with pytest.raises(ValueError, match="must be float32 of shape"):
            exchange.step(wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(60).to_sparse(), torch.zeros(60, device="meta")], ids=["sparse", "meta"])
def test_a_gradient_of_another_kind_is_refused_on_all_ranks(wrong: Tensor) -> None:
    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=30, k=3), 60, transport)
        with pytest.raises((RuntimeError, ValueError), match=r"must be float32 of shape \(60,\), dense and on cpu"):
            exchange.step(wrong if transport.rank else torch.ones(60))

    run_local(2, main)


def local_one():
    from hvd_sketch.transport import local_transports

    return local_transports(1)[0]


def test_clamping_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=30, k=30, momentum=0.0), 100, transport)
        return [exchange.step(float_gradient(100, transport.rank, s)).indices.numel() for s in range(2)]

    assert run_local(3, main) == [[30, 30]] * 3
    assert caplog.text.count("reaches dim 100") == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resuming_is_bitwise(momentum: float) -> None:
    config, dim = SketchConfig.paper(cols=120, k=20, momentum=momentum), 700

    def main(transport):
        first = SketchedAllreduce(config, dim, transport)
        for step in range(3):
            first.step(float_gradient(dim, transport.rank, step))
        saved = first.state_dict()
        second = SketchedAllreduce(config, dim, transport)
        second.load_state_dict(saved)
        before = len(first.ledger.records)
        for step in range(3, 6):
            gradient = float_gradient(dim, transport.rank, step)
            a, b = first.step(gradient), second.step(gradient)
            assert torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)
        sent = [replace(record, step=record.step - 3) for record in list(first.ledger.records)[before:]]
        assert sent == list(second.ledger.records)[-len(sent) :]  # thresholds are saved: no histogram is repeated
        return torch.equal(first.residual, second.residual) and torch.equal(first.velocity, second.velocity)

    assert all(run_local(3, main))


def test_a_consolidated_state_loads_at_any_world_size() -> None:
    config, dim = SketchConfig.paper(cols=120, k=20, momentum=0.5), 700

    def save(transport):
        exchange = SketchedAllreduce(config, dim, transport)
        exchange.step(integer_gradient(dim, transport.rank, 0))
        return exchange.state_dict(consolidated=True), exchange.state_dict()

    saved = run_local(4, save)
    mean = sum(own["v"] for _, own in saved) / 4
    for consolidated, _ in saved:
        assert torch.equal(consolidated["v"], mean)

    def load(transport):
        exchange = SketchedAllreduce(config, dim, transport)
        exchange.load_state_dict(saved[0][0])
        with pytest.raises(ValueError, match="consolidated=True"):
            exchange.load_state_dict(saved[1][1])
        return exchange.residual

    for ranks in (1, 2, 3):
        # The update still to come is the mean of the residuals: unchanged.
        assert torch.equal(sum(run_local(ranks, load)) / ranks, mean)


def test_checkpoints_of_different_steps_raise_on_every_rank() -> None:
    def main(transport):
        exchange = SketchedAllreduce(SketchConfig.paper(cols=30, k=5), 100, transport)
        early = exchange.state_dict()
        exchange.step(torch.ones(100))
        if transport.rank == 1:
            exchange.load_state_dict(early)
        with pytest.raises(RuntimeError, match=r"different steps, in rank order \[1, 0, 1\]"):
            exchange.step(torch.ones(100))
        return True

    assert all(run_local(3, main))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("deterministic", [False, True])
def test_dense_is_the_mean(ranks: int, deterministic: bool) -> None:
    dim = 1001
    config = SketchConfig.paper(cols=1, k=1, momentum=0.5, deterministic=deterministic)

    def main(transport):
        plain = DenseAllreduce(None, dim, transport)
        heavy = DenseAllreduce(config, dim, transport)
        gradients = [integer_gradient(dim, transport.rank, step) for step in range(2)]
        updates = [(plain.step(g).values, heavy.step(g).values) for g in gradients]
        assert plain.step(gradients[0] * float("nan")).skipped
        restored = DenseAllreduce(config, dim, transport)
        restored.load_state_dict(heavy.state_dict())
        return updates, restored.velocity, plain.ledger.compression_ratio()

    means = [sum(integer_gradient(dim, r, s) for r in range(ranks)) / ranks for s in range(2)]
    with pytest.warns(RuntimeWarning, match="NaN or Inf"):
        results = run_local(ranks, main)
    for updates, velocity, ratio in results:
        assert torch.equal(updates[0][0], means[0]) and torch.equal(updates[1][0], means[1])
        torch.testing.assert_close(updates[1][1], 0.5 * means[0] + means[1])
        assert torch.equal(velocity, updates[1][1])
        assert 0.95 < ratio <= 1
