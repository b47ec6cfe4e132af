"""optimizer.ahead(): gradients are of parameters that a rank's own residual has moved; all else is as without it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from hvd_sketch import DistributedOptimizer, LowRankConfig, Simulation, SketchConfig
from hvd_sketch.config import Compression
from hvd_sketch.kernels.step_ahead import Move, by_torch_, step_ahead_
from hvd_sketch.model.step_ahead import MOST, Ahead
from hvd_sketch.optim import LagAdamW
from hvd_sketch.simulate import train
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.rounds import backward, flat, loss_of, network
from tests.support.toy import LIMIT_S

RATE = 0.01
COMPRESSIONS: dict[str, Compression] = {
    "sketch": SketchConfig(cols=400, k=100),
    "nominate": SketchConfig(k=200, candidates="nominate"),
    "random": SketchConfig(k=400, candidates="random"),
    "low rank": LowRankConfig(rank=2, dense_below=1024),
}


def wrapped(model: nn.Module, compression: Compression, transport: LocalTransport, kind: type = LagAdamW) -> Any:
    inner = kind(model.parameters(), lr=RATE)
    return DistributedOptimizer(inner, model.named_parameters(), compression, transport, check_every=1)


def run(model: nn.Module, optimizer: Any, rank: int, steps: range, is_ahead: bool = True) -> None:
    for step in steps:
        optimizer.zero_grad()
        with optimizer.ahead() if is_ahead else nullcontext():
            backward(model, rank, step)
        optimizer.step()


def trained(transport: LocalTransport, name: str, is_ahead: bool = True) -> Tensor:
    model = network()
    optimizer = wrapped(model, replace(COMPRESSIONS[name], deterministic=True), transport)
    run(model, optimizer, transport.rank, range(12), is_ahead)
    return flat(model.parameters())


def assert_equal(of_ranks: list[Tensor]) -> None:
    assert all(torch.equal(own, of_ranks[0]) for own in of_ranks)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_it_is_where_the_optimizer_will_come_to(kind: type) -> None:
    """Without anything but the gradient that is left, which comes in the next step."""
    draw = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(200, generator=draw, dtype=torch.float64))
    optimizer = kind([parameter], lr=RATE, weight_decay=0.0)
    for _ in range(4000):
        parameter.grad = torch.randn(200, generator=draw, dtype=torch.float64)
        optimizer.step()
    optimizer.state[parameter]["exp_avg"].zero_()
    start = parameter.detach().clone()
    left = torch.randn(200, generator=draw, dtype=torch.float64) / 2
    ahead = Ahead(optimizer)
    ahead.go_([(parameter, left)], 1.0)
    predicted = parameter.detach() - start
    ahead.back_()
    assert torch.equal(parameter.detach(), start)
    for number in range(150):
        parameter.grad = left * (number == 0)
        optimizer.step()
    torch.testing.assert_close(parameter.detach() - start, predicted, rtol=0.05, atol=1e-5)


def test_a_move_is_limited_and_finite() -> None:
    parameter = nn.Parameter(torch.zeros(6))
    optimizer = AdamW([parameter], lr=RATE)
    parameter.grad = torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0, 1.0])
    optimizer.step()
    parameter.data.zero_()
    ahead = Ahead(optimizer)
    ahead.go_([(parameter, torch.tensor([1.0, 1.0, 1.0, -float("inf"), float("nan"), 0.0]))], 0.5)
    expected = RATE / 2 * torch.tensor([0.0, -MOST, -1.0, MOST, 0.0, 0.0])
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("size", [1, 7, 300_001])
def test_the_kernel_is_its_reference(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    tensors = [torch.randn(size, generator=draw) for _ in range(4)]
    tensors[2] = tensors[2].clamp_(min=0.0) ** 4
    tensors[1][::3] = float("nan")
    others = [tensor.clone() for tensor in tensors]
    move = Move(2.0, 1.25, 1e-8, MOST, 0.01)
    for function, (parameter, left, squares, kept) in ((step_ahead_, tensors), (by_torch_, others)):
        function(parameter, left, squares, kept, move)
    torch.testing.assert_close(tensors[0], others[0])
    assert torch.equal(tensors[3], others[3])


def test_parameters_of_16_bits_and_of_other_layouts() -> None:
    for make in (lambda p: p.bfloat16(), lambda p: p.t().contiguous().t()):
        parameter = nn.Parameter(make(torch.ones(30, 20)))
        optimizer = AdamW([parameter], lr=RATE)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        before = parameter.detach().clone()
        ahead = Ahead(optimizer)
        ahead.go_([(parameter, torch.ones(30, 20))])
        torch.testing.assert_close(parameter.detach(), before - RATE / 4, rtol=0, atol=5e-3)
        assert (parameter < before).all()
        ahead.back_()
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_stay_equal_and_simulated_ones_are_the_same(name: str, ranks: int) -> None:
    ours = run_local(ranks, partial(trained, name=name), LIMIT_S)
    assert_equal(ours)
    assert not torch.equal(ours[0], run_local(ranks, partial(trained, name=name, is_ahead=False), LIMIT_S)[0])
    model = network()
    simulation = Simulation(model.named_parameters(), COMPRESSIONS[name], ranks)
    optimizer = LagAdamW(model.parameters(), lr=RATE)
    batches = [(rank, step) for step in range(12) for rank in range(ranks)]
    assert len(list(train(model, optimizer, simulation, loss_of, batches, step_ahead=True))) == 12
    assert torch.equal(flat(model.parameters()), ours[0])


def test_nothing_changes_where_nothing_is_left() -> None:
    def job(transport: LocalTransport, is_ahead: bool) -> Tensor:
        model = network()
        config = SketchConfig(k=3500, candidates="random", value_bits=32, dense_below=8)
        optimizer = wrapped(model, config, transport, AdamW)
        run(model, optimizer, transport.rank, range(6), is_ahead)
        assert not optimizer.exchange.residual.any()
        return flat(model.parameters())

    (one, _), (other, _) = (run_local(2, partial(job, is_ahead=is_ahead), LIMIT_S) for is_ahead in (True, False))
    assert torch.equal(one, other)


def test_only_what_is_inside_sees_it() -> None:
    def job(transport: LocalTransport) -> None:
        model = network()
        optimizer = wrapped(model, COMPRESSIONS["nominate"], transport)
        with optimizer.ahead():
            assert torch.equal(flat(model.parameters()), flat(network().parameters())), "nothing is left yet"
        run(model, optimizer, transport.rank, range(3))
        shared = flat(model.parameters())
        with optimizer.ahead():
            ahead = flat(model.parameters())
            with optimizer.ahead():
                assert torch.equal(flat(model.parameters()), ahead)
            assert torch.equal(flat(model.parameters()), ahead)
        assert torch.equal(flat(model.parameters()), shared) and not torch.equal(ahead, shared)
        with optimizer.ahead(share=1.0):
            torch.testing.assert_close(flat(model.parameters()) - shared, 4 * (ahead - shared), rtol=1e-3, atol=1e-6)
        with pytest.raises(KeyError), optimizer.ahead():
            raise KeyError
        assert torch.equal(flat(model.parameters()), shared)
        model[0].weight.requires_grad_(False)
        frozen = model[0].weight.detach().clone()
        optimizer.zero_grad()
        with optimizer.ahead():
            assert torch.equal(model[0].weight, frozen)
            backward(model, 0, 3)
            optimizer.step()  # puts back what is ahead
        assert torch.equal(model[0].weight, frozen) and not torch.equal(flat(model.parameters()), shared)

    run_local(1, job, LIMIT_S)


def test_parameters_that_share_memory_come_back() -> None:
    def job(transport: LocalTransport) -> Tensor:
        model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 40, bias=False))
        torch.nn.init.orthogonal_(model[0].weight, generator=torch.Generator().manual_seed(0))
        model[1].weight.data = model[0].weight.data.t()
        optimizer = wrapped(model, COMPRESSIONS["nominate"], transport, AdamW)
        for step in range(4):
            optimizer.zero_grad()
            inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(9 * step + transport.rank))
            with optimizer.ahead():
                (model(inputs) - inputs).square().mean().backward()
            optimizer.step()
        return flat(model.parameters())

    assert_equal(run_local(2, job, LIMIT_S))


def test_clipping_skips_and_early_leavers() -> None:
    """Between synchronize() and step(), around a step that all skip, and for a rank that has no data any more."""

    def job(transport: LocalTransport) -> Tensor:
        model = network()
        optimizer = wrapped(model, COMPRESSIONS["low rank"], transport, AdamW)
        with optimizer.join():
            for step in range(6 + 2 * transport.rank):
                optimizer.zero_grad()
                with optimizer.ahead():
                    backward(model, transport.rank, step)
                    if step == 3 and transport.rank == 1:
                        model[0].weight.grad[0, 0] = float("nan")
                    if optimizer.synchronize():
                        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                with optimizer.ahead(), optimizer.skip_synchronize():
                    optimizer.step()
        assert optimizer.skipped_steps == 1
        return flat(model.parameters())

    assert_equal(run_local(2, job, LIMIT_S))


def test_a_change_that_would_be_lost_is_an_error() -> None:
    def job(transport: LocalTransport) -> None:
        model = network()
        optimizer = wrapped(model, COMPRESSIONS["nominate"], transport)
        run(model, optimizer, transport.rank, range(2))
        shared = flat(model.parameters())
        with pytest.raises(RuntimeError, match=r"1 of 2 parameters were changed inside ahead\(\)"), optimizer.ahead():
            backward(model, 0, 2)
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)
        assert torch.equal(flat(model.parameters()), shared)

    run_local(1, job, LIMIT_S)


def test_a_change_before_a_step_inside_is_refused_on_all_ranks() -> None:
    def job(transport: LocalTransport) -> str:
        model = network()
        optimizer = wrapped(model, COMPRESSIONS["nominate"], transport)
        run(model, optimizer, transport.rank, range(2))
        with pytest.raises(RuntimeError) as raised, optimizer.ahead():
            backward(model, 0, 2)
            if transport.rank == 1:
                with torch.no_grad():
                    model[0].weight.clamp_(-0.1, 0.1)
            optimizer.step()
        return str(raised.value)

    others, own = run_local(2, job, LIMIT_S)
    assert own.startswith("1 of 2 parameters were changed inside ahead()")
    assert others.startswith("rank 1 of 2 cannot take this step, so no rank does: 1 of 2 parameters")


def test_a_state_before_its_first_step() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=RATE)
    parameter.grad = torch.ones(3)
    optimizer.step()
    for value in optimizer.state[parameter].values():
        value.zero_()
    before = parameter.detach().clone()
    ahead = Ahead(optimizer)
    ahead.go_([(parameter, torch.ones(3))])
    assert torch.equal(parameter.detach(), before)


def test_refusals() -> None:
    def refused(optimizer: Any, message: str, share: Any = 0.25) -> None:
        with pytest.raises(ValueError, match=message), optimizer.ahead(share):
            pass

    def job(transport: LocalTransport) -> None:
        model, compression = network(), COMPRESSIONS["nominate"]
        refused(wrapped(model, compression, transport, torch.optim.SGD), "that arrives late is known, got SGD")
        refused(wrapped(model, None, transport, AdamW), "nothing is compressed")
        refused(wrapped(model, compression, transport, AdamW), r"share must be in \[0, 1\], got 2", share=2)
        inner = AdamW(model.parameters())
        refused(DistributedOptimizer(inner, None, compression, transport, levels=2), "is for levels=1")

    run_local(1, job, LIMIT_S)


def test_a_rank_outside_of_its_process_set_stays_where_it_is() -> None:
    class Others:
        def included(self) -> bool:
            return False

    model = network()
    others: Any = Others()
    optimizer = DistributedOptimizer(
        AdamW(model.parameters()), None, COMPRESSIONS["nominate"], "horovod", process_set=others
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with optimizer.ahead():
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("compiled", ["model", "step", "both"])
def test_compiled_models_and_steps_train_as_others(compiled: str) -> None:
    def job(transport: LocalTransport, of: str) -> Tensor:
        torch._dynamo.reset()
        model = network()
        optimizer = wrapped(model, COMPRESSIONS["nominate"], transport, AdamW)
        forward = torch.compile(model, backend="eager") if of in ("model", "both") else model
        step = torch.compile(optimizer.step, backend="eager") if of in ("step", "both") else optimizer.step
        for number in range(6):
            optimizer.zero_grad()
            with optimizer.ahead():
                backward(forward, 0, number)
            step()
        return flat(model.parameters())

    (ours,), (plain,) = run_local(1, partial(job, of=compiled), LIMIT_S), run_local(1, partial(job, of=""), LIMIT_S)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
