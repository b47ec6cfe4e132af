"""Simulated workers equal real exchanges between as many ranks to the bit, and count the same bytes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.paper.one_process import in_own_order
from benchmarks.paper.workers import DenseWorkers, LocalTopK, SketchedWorkers, TrueTopK, Variant, Workers
from hvd_sketch import CommLedger, DenseAllreduce, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange.base import SparseUpdate
from hvd_sketch.hashing import BlockHash
from hvd_sketch.transport import run_local

STEPS = 5
# Few candidates, whose values all travel, and many, among which owners choose; even and odd numbers of rows.
CASES: list[tuple[int, dict[str, Any]]] = [
    (1013, {"rows": 3, "cols": 160, "k": 40, "oversample": 4}),
    (40_007, {"rows": 4, "cols": 1201, "k": 3001, "oversample": 5}),
    (2501, {"rows": 5, "cols": 401, "k": 100, "selection": "heavymix"}),
]


def gradients(step: int, workers: int, dim: int) -> Tensor:
    """Float32 [workers, dim]: heavy-tailed, then few whole numbers with ties and zeros, then nearly all zero."""
    draw = np.random.default_rng([4, step, dim])
    values = draw.standard_normal((workers, dim)) ** 3
    if step == 2:
        values = (values / 4).round().clip(-2, 2)
    if step == 4:
        values *= np.arange(dim) < 4
    return torch.from_numpy(values.astype(np.float32))


def run_steps(exchange: Workers, steps: int = STEPS, start: int = 0) -> list[SparseUpdate]:
    updates = []
    for step in range(start, start + steps):
        for worker, gradient in enumerate(gradients(step, exchange.workers, exchange.dim)):
            cut = exchange.dim // 3
            exchange.add(worker, [gradient[:cut], gradient[cut:]])
        updates.append(exchange.finish())
    return updates


def sizes(ledger: CommLedger) -> Counter[tuple[Any, ...]]:
    return Counter((r.step, r.phase, r.collective, r.dtype, r.payload_bytes, r.wire_bytes) for r in ledger.records)


def assert_equal_to_real(simulated: Workers, make: Any) -> None:
    def real(transport: Any) -> tuple[list[SparseUpdate], CommLedger]:
        exchange = make(transport)
        updates = []
        for step in range(STEPS):
            own = gradients(step, simulated.workers, simulated.dim)[transport.rank]
            cut = simulated.dim // 3
            updates.append(exchange.step([own[:cut], own[cut:]] if make is not _dense else own))
        return updates, exchange.ledger

    expected, ledger = run_local(simulated.workers, real, timeout_s=60)[0]
    for step, (ours, theirs) in enumerate(zip(run_steps(simulated), expected, strict=True)):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values), step
        assert ours.indices.numel() or step == STEPS - 1
    assert sizes(simulated.ledger) == sizes(ledger)
    assert simulated.ledger.compression_ratio() == ledger.compression_ratio()
    assert simulated.ledger.paper_compression_ratio() == ledger.paper_compression_ratio()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize(("dim", "settings"), CASES)
def test_sketched_workers_equal_real_ranks(dim: int, settings: dict[str, Any], workers: int, momentum: float) -> None:
    config = SketchConfig(deterministic=True, momentum=momentum, seed=7, **settings)
    simulated = SketchedWorkers(config, dim, workers, ledger=CommLedger())
    assert_equal_to_real(simulated, lambda transport: SketchedAllreduce(config, dim, transport))


def _dense(transport: Any) -> DenseAllreduce:
    return DenseAllreduce(SketchConfig(cols=4, k=1, momentum=0.9, deterministic=True), 1013, transport)


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_dense_workers_equal_real_ranks(workers: int) -> None:
    config = SketchConfig(cols=4, k=1, momentum=0.9)
    assert_equal_to_real(DenseWorkers(config, 1013, workers, ledger=CommLedger()), _dense)


def test_positions_in_the_owners_order() -> None:
    hash = BlockHash(4999, 1, 400, shards=3, seed=2)
    chosen = torch.arange(0, 4999, 7)
    for owner in range(3):
        own = chosen[torch.from_numpy(hash.shard_of(chosen.numpy() // hash.block) == owner)]
        assert torch.equal(torch.from_numpy(hash.owned_to_global(owner, in_own_order(hash, own).numpy())), own)


CONFIG = SketchConfig(rows=3, cols=150, k=50, momentum=0.9)
DIM, WORKERS = 1013, 4


def naive(method: type[Workers], momentum: float) -> list[Tensor]:
    """The mean updates of true and local top-k, written out with torch.topk; float32 [dim] each."""
    u, v = torch.zeros(2, WORKERS, DIM)
    updates = []
    for step in range(2):
        u = u * momentum + gradients(step, WORKERS, DIM)
        v = v + u
        sent = torch.zeros_like(v, dtype=torch.bool)
        if method is TrueTopK:
            sent[:, v.sum(0).abs().topk(CONFIG.k).indices] = True
        else:
            sent.scatter_(1, v.abs().topk(CONFIG.k).indices, True)
        updates.append((v * sent).sum(0) / WORKERS)
        u, v = u * ~sent, v * ~sent
    return updates


@pytest.mark.parametrize("method", [TrueTopK, LocalTopK])
def test_peers_of_the_sketch(method: type[Workers]) -> None:
    exchange = method(CONFIG, DIM, WORKERS)
    for update, expected in zip(run_steps(exchange, 2), naive(method, 0.9), strict=True):
        dense = torch.zeros(DIM).index_copy_(0, update.indices, update.values)
        assert torch.allclose(dense, expected, atol=1e-5)
        assert exchange.updated == CONFIG.k if method is TrueTopK else CONFIG.k < len(update.indices) < 4 * CONFIG.k


def test_bytes_of_local_top_k_grow_with_the_workers() -> None:
    for workers in (2, 8):
        exchange = LocalTopK(CONFIG, DIM, workers)
        run_steps(exchange, 1)
        finite_bytes = 16 * (workers - 1)  # an allreduce of 8 bytes for each
        assert exchange.ledger.totals().wire_bytes == 8 * CONFIG.k * (workers - 1) + finite_bytes


@pytest.mark.parametrize("method", [DenseWorkers, SketchedWorkers, TrueTopK, LocalTopK])
@pytest.mark.parametrize("variant", [Variant(), Variant(momentum="after")])
def test_going_on_from_a_state(method: type[Workers], variant: Variant) -> None:
    whole, first, second = (method(CONFIG, DIM, WORKERS, variant=variant) for _ in range(3))
    expected = run_steps(whole)[2:]
    run_steps(first, 2)
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(run_steps(second, STEPS - 2, start=2), expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values)


def dense_updates(variant: Variant, momentum: float = 0.9) -> Tensor:
    """Float32 [steps, dim]."""
    exchange = SketchedWorkers(dataclasses.replace(CONFIG, momentum=momentum), DIM, WORKERS, variant=variant)
    updates = run_steps(exchange, 2)
    return torch.stack([torch.zeros(DIM).index_copy_(0, update.indices, update.values) for update in updates])


def test_momentum_after_the_selection_is_a_recurrence_over_updates() -> None:
    plain, late = dense_updates(Variant(), momentum=0.0), dense_updates(Variant(momentum="after"))
    assert torch.equal(late[0], plain[0]) and torch.equal(late[1], late[0] * 0.9 + plain[1])
    assert torch.equal(dense_updates(Variant(momentum="none")), plain)


def test_variants_change_what_they_name() -> None:
    paper = dense_updates(Variant())
    for variant in (Variant(fresh_hashes=False), Variant(masking=False)):
        changed = dense_updates(variant)
        assert torch.equal(changed[0], paper[0]) and not torch.equal(changed[1], paper[1])


def chosen_of(values: dict[int, float], **variant: Any) -> list[int]:
    """What one worker with k = P = 1 sends of a gradient."""
    config = SketchConfig(rows=3, cols=400, k=1, oversample=1, momentum=0.0)
    exchange = SketchedWorkers(config, DIM, 1, variant=Variant(**variant))
    exchange.add(0, torch.zeros(DIM).index_copy_(0, torch.tensor(list(values)), torch.tensor(list(values.values()))))
    return exchange.finish().indices.tolist()


def test_tables_are_rounded() -> None:
    """1e-9 is 0 in float16, and zeros are not sent."""
    assert chosen_of({5: 1e-9}) == [5] == chosen_of({5: 1e-9}, table_dtype="bfloat16")
    assert chosen_of({5: 1e-9}, table_dtype="float16") == []


def test_without_masking_u_goes_on_where_v_was_sent() -> None:
    exchange = SketchedWorkers(CONFIG, DIM, 1, variant=Variant(masking=False))
    (update,) = run_steps(exchange, 1)
    feedback = exchange.state_dict()["feedbacks"][0]
    assert not feedback["v"][update.indices].any() and feedback["u"][update.indices].all()


def test_sixteen_bit_tables_halve_the_bytes_of_the_table() -> None:
    ledgers = {}
    for dtype in ("float32", "bfloat16"):
        exchange = SketchedWorkers(CONFIG, DIM, WORKERS, variant=Variant(table_dtype=dtype), ledger=CommLedger())
        run_steps(exchange, 1)
        ledgers[dtype] = sum(r.payload_bytes for r in exchange.ledger.records if r.phase == "sketch")
    assert ledgers["bfloat16"] * 2 == ledgers["float32"] > 0


def test_misuse_is_refused() -> None:
    exchange = TrueTopK(CONFIG, DIM, 2)
    with pytest.raises(ValueError, match="expected 0, got 1"):
        exchange.add(1, torch.zeros(DIM))
    exchange.add(0, torch.zeros(DIM))
    with pytest.raises(ValueError, match="only 1"):
        exchange.finish()
    with pytest.raises(ValueError, match="1013"):
        exchange.add(1, torch.zeros(3))
    with pytest.raises(FloatingPointError, match="worker 1"):
        exchange.add(1, torch.full((DIM,), float("nan")))
