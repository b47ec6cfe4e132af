"""What is built on the Triton kernels against the reference: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from hvd_sketch import CountSketch, LowRankAllreduce, LowRankConfig, SketchConfig, SketchedAllreduce
from hvd_sketch import kernels as backends
from hvd_sketch.exchange.candidates import nominate, sketch
from hvd_sketch.model.flat_parameters import FlatParameters
from hvd_sketch.transport import LocalTransport, run_local
from tests.gpu.test_kernels import DEVICE
from tests.gpu.test_kernels import poisoned_outputs as poisoned_outputs  # for these tests, too
from tests.support.vectors import random_integers


def test_count_sketch() -> None:
    values = random_integers(2_000)
    ours = CountSketch(2_000, 3, 700, seed=5, shards=2, device=DEVICE, backend="triton")
    theirs = CountSketch(2_000, 3, 700, seed=5, shards=2, backend="reference")
    for step in (0, 1):
        ours.zero_(step).accumulate_(values[:900].to(DEVICE)).accumulate_(values[900:].to(DEVICE), 900).merge_(ours)
        theirs.zero_(step).accumulate_(values).merge_(theirs)
        assert torch.equal(ours.table.cpu(), theirs.table)
        assert torch.equal(ours.estimate(13, 1999).cpu(), theirs.estimate(13, 1999))
        assert torch.equal(ours.top(100).cpu(), theirs.top(100))
        assert torch.equal(ours.heavymix(100, 7).cpu(), theirs.heavymix(100, 7))


def test_an_update_reaches_all_kinds_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous ones by a launch for each dtype, others one by one; unused ones get none."""

    def gradients(backend: str, device: torch.device) -> list[Tensor | None]:
        monkeypatch.setitem(backends.DEFAULT_BACKENDS, device.type, backend)
        shapes = [(30, 40), (7, 3, 3, 3), (500,), (0, 4), (25, 60), (9, 9)]
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
        parameters[5].data = parameters[5].data.double()
        flat = FlatParameters([(str(i), p) for i, p in enumerate(parameters)])
        indices = torch.arange(0, flat.dim, 2)
        flat.unpack_sparse(indices.to(device), random_integers(len(indices)).to(device), [i != 2 for i in range(6)])
        return [None if p.grad is None else p.grad.cpu() for p in parameters]

    ours, theirs = gradients("triton", DEVICE), gradients("reference", torch.device("cpu"))
    assert ours[2] is None and theirs[2] is None
    for mine, right in zip(ours, theirs, strict=True):
        assert mine is right or torch.equal(mine, right)
    assert all(mine.any() for mine in ours if mine is not None and mine.numel())


@pytest.mark.parametrize(
    ("dim", "k", "ties"),
    [
        pytest.param(2_000, 20, False, id="every sum travels"),
        pytest.param(6_000, 1_000, False, id="owners choose"),
        pytest.param(6_000, 1_000, True, id="all are equal"),
    ],
)
def test_exchange_selects_what_the_reference_selects(
    dim: int, k: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SketchConfig.paper(rows=3, cols=400, k=k, deterministic=True)
    gradients = [torch.ones(dim) if ties else random_integers(dim, seed) for seed in range(2)]

    def two_steps(device: torch.device, transport: LocalTransport) -> list[Tensor]:
        exchange = SketchedAllreduce(config, dim, transport, device)
        steps = [exchange.step(gradients[transport.rank].to(device)) for _ in range(2)]
        return [tensor.cpu() for step in steps for tensor in (step.indices, step.values)]

    updates = []
    for name in ("triton", "reference"):
        device = DEVICE if name == "triton" else torch.device("cpu")
        monkeypatch.setitem(backends.DEFAULT_BACKENDS, device.type, name)
        updates += run_local(2, partial(two_steps, device))
    assert all(torch.equal(a, b) for update in updates[1:] for a, b in zip(update, updates[0], strict=True))


@pytest.mark.parametrize(
    ("config", "most_sorted"),
    [
        pytest.param(SketchConfig(rows=3, cols=400, k=60, deterministic=True), 5_000, id="sketch"),
        pytest.param(SketchConfig(rows=3, cols=400, k=60, deterministic=True), 50, id="sketch, too many to sort"),
        pytest.param(SketchConfig(k=60, candidates="nominate"), 5_000, id="nominate"),
        pytest.param(SketchConfig(k=60, candidates="nominate"), 50, id="nominate, too many to sort"),
        pytest.param(SketchConfig(k=60, candidates="random"), 5_000, id="random"),
    ],
)
def test_few_bit_exchanges_of_threads_have_the_reference_bits(
    config: SketchConfig, most_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with few positions, which the host codes."""
    for module in (nominate, sketch):
        monkeypatch.setattr(module, "SORTED", most_sorted)
    gradients = [random_integers(2_000, seed) for seed in range(2)]

    def three_steps(device: torch.device, transport: LocalTransport) -> list[Tensor]:
        exchange = SketchedAllreduce(config, 2_000, transport, device)
        steps = [exchange.step(gradients[transport.rank].to(device)) for _ in range(3)]
        return [tensor.cpu() for step in steps for tensor in (step.indices, step.values)] + [exchange.residual.cpu()]

    monkeypatch.setitem(backends.DEFAULT_BACKENDS, DEVICE.type, "triton")
    ours = run_local(2, partial(three_steps, DEVICE))
    monkeypatch.setitem(backends.DEFAULT_BACKENDS, "cpu", "reference")
    theirs = run_local(2, partial(three_steps, torch.device("cpu")))
    for mine, right in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_low_rank_of_threads() -> None:
    """On a GPU by torch, whose sums have another order than a CPU's."""
    gradients = [random_integers(2_000, seed) for seed in range(2)]

    def three_steps(device: torch.device, transport: LocalTransport) -> list[Tensor]:
        exchange = LowRankAllreduce(LowRankConfig(rank=2), 2_000, transport, device, shapes=[(40, 30), (20, 40)])
        steps = [exchange.step(gradients[transport.rank].to(device)) for _ in range(3)]
        return [step.values.cpu() for step in steps] + [exchange.residual.cpu()]

    ours, theirs = (run_local(2, partial(three_steps, device)) for device in (DEVICE, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(ours[0][:-1], ours[1][:-1], strict=True))
    for mine, right in zip(ours, theirs, strict=True):
        assert all(torch.allclose(a, b, atol=0.5) for a, b in zip(mine, right, strict=True))
    produced = 3 * sum(gradients)
    sent = 2 * sum(ours[0][:-1])
    assert torch.allclose(sent + ours[0][-1] + ours[1][-1], produced, atol=1e-3)
