"""What every exchange must do, ours and the competitors': nothing is lost, all ranks agree, states go on to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.methods.allreduce import LibraryAllreduce
from benchmarks.methods.top_k import CountedTopK, LocalTopK, TrueTopK
from hvd_sketch import DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.base import Exchange, SparseUpdate
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from tests.support.targets import integer_gradient

DIM, STEPS = 2003, 5
KINDS: dict[str, tuple[type[Exchange], dict[str, Any]]] = {
    "sketched": (SketchedAllreduce, {}),
    "heavymix": (SketchedAllreduce, {"candidates": "heavymix"}),
    "nominated": (SketchedAllreduce, {"candidates": "nominate", "oversample": 1}),
    "random": (SketchedAllreduce, {"candidates": "random", "oversample": 1}),
    "dense": (DenseAllreduce, {}),
    "local top-k": (LocalTopK, {}),
    "counted top-k": (CountedTopK, {}),
    "true top-k": (TrueTopK, {}),
    "library": (LibraryAllreduce, {}),
}
every = pytest.mark.parametrize("kind", KINDS)
ranked = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


def build(kind: str, transport: LocalTransport, momentum: float = 0.0) -> Exchange:
    make, settings = KINDS[kind]
    return make(SketchConfig.paper(cols=240, k=60, momentum=momentum, **settings), DIM, transport)


def in_full(update: SparseUpdate) -> Tensor:
    if update.indices is None:
        return update.values.clone()
    assert bool((update.indices.diff() > 0).all())
    return torch.zeros(DIM).index_copy_(0, update.indices, update.values)


def in_halves(exchange: Exchange, gradient: Tensor) -> Tensor:
    """A step in slices, by its two halves."""
    cut = DIM // 3
    exchange.accumulate([gradient[:cut], gradient[cut:]])
    return in_full(exchange.agree())


@every
@ranked
def test_what_is_sent_and_kept_is_what_was_produced(kind: str, ranks: int) -> None:
    def main(transport: LocalTransport) -> tuple[Tensor, Tensor]:
        exchange = build(kind, transport)
        sent = torch.zeros(DIM)
        for step in range(STEPS):
            gradient = integer_gradient(DIM, transport.rank, step)
            update = in_halves(exchange, gradient) if step % 2 else in_full(exchange.step(gradient.clone()))
            sent += update.mul(ranks).round()  # the mean of whole numbers times the ranks
        return sent, exchange.residual.clone()

    results = run_local(ranks, main, timeout_s=60)
    produced = sum(integer_gradient(DIM, rank, step) for rank in range(ranks) for step in range(STEPS))
    assert all(torch.equal(sent, results[0][0]) for sent, _ in results), "the ranks differ"
    assert torch.equal(results[0][0] + sum(kept for _, kept in results), produced)


@every
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_goes_on_from_its_state_to_the_bit(kind: str, momentum: float) -> None:
    def main(transport: LocalTransport) -> None:
        whole, first, second = (build(kind, transport, momentum) for _ in range(3))
        gradients = [integer_gradient(DIM, transport.rank, step) for step in range(STEPS)]
        expected = [in_full(whole.step(gradient.clone())) for gradient in gradients]
        for gradient in gradients[:2]:
            first.step(gradient.clone())
        second.load_state_dict(first.state_dict())
        assert second.step_number == 2
        for gradient, update in zip(gradients[2:], expected[2:], strict=True):
            assert torch.equal(in_full(second.step(gradient.clone())), update)
        assert torch.equal(second.residual, whole.residual)

    run_local(3, main, timeout_s=60)


@pytest.mark.parametrize("kind", ["sketched", "nominated", "random", "dense", "true top-k"])
@pytest.mark.filterwarnings("ignore:all ranks skip this step")
def test_a_bad_gradient_changes_nothing_and_unused_coordinates_stay(kind: str) -> None:
    def main(transport: LocalTransport) -> None:
        exchange = build(kind, transport, momentum=0.5)
        exchange.step(integer_gradient(DIM, transport.rank, 0))
        before = [exchange.residual.clone(), exchange.velocity.clone()]
        broken = integer_gradient(DIM, transport.rank, 1)
        if transport.rank == 1:
            broken[7] = float("nan")
        assert exchange.step(broken).skipped and exchange.skipped_steps == 1 and exchange.step_number == 2
        assert all(map(torch.equal, before, [exchange.residual, exchange.velocity]))
        exchange.accumulate([integer_gradient(DIM, transport.rank, 2)], unused=[(100, 300)])
        exchange.agree()
        after = [exchange.residual, exchange.velocity]
        assert all(torch.equal(a[100:300], b[100:300]) for a, b in zip(before, after, strict=True))

    run_local(2, main, timeout_s=60)


def test_names_of_before_still_work_with_a_warning() -> None:
    def main(transport: LocalTransport) -> None:
        gradient = integer_gradient(DIM, transport.rank, 0)
        sketched, old = build("sketched", transport), build("sketched", transport)
        with pytest.warns(DeprecationWarning, match="exchange"):
            assert torch.equal(in_full(old.exchange([gradient])), in_full(sketched.step(gradient)))
        dense, old = build("dense", transport), build("dense", transport)
        with pytest.warns(DeprecationWarning, match="mean"):
            assert torch.equal(old.mean(gradient), dense.step(gradient).values)

    main(local_transports(1)[0])
