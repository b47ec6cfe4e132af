"""Who catches an error and goes on, goes on as if the step that failed had not been."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hvd_sketch import DistributedOptimizer, broadcast_optimizer_state
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.rounds import backward, flat, network, train, wrap
from tests.support.toy import LIMIT_S


def is_equal_on_all(transport: LocalTransport, tensors: object) -> bool:
    every = transport.allgather(flat(tensors)).view(transport.size, -1)
    return bool((every == every[0]).all())


@pytest.mark.parametrize("what", ["unfrozen", "too many skips"])
def test_a_round_that_failed_is_followed_by_a_whole_one(what: str) -> None:
    """With a state of the wrapped optimizer that is finite, and no difference of parameters taken for a gradient."""
    models = [network() for _ in range(2)]

    def main(transport: LocalTransport) -> None:
        model = models[transport.rank]
        model[0].bias.requires_grad_(False)
        optimizer = wrap(transport, model, None, every=2, max_skips=1)
        exchanged = [parameter for parameter in model.parameters() if parameter is not model[0].bias]
        start = flat(exchanged)
        if what == "unfrozen":
            model[0].bias.requires_grad_(True)
            with pytest.raises(RuntimeError, match="began to require a gradient"):
                train(model, optimizer, transport.rank, range(2))
            model[0].bias.requires_grad_(False)
        else:
            with pytest.raises(RuntimeError, match="skipped 2 steps in a row"):
                for _ in range(4):
                    optimizer.zero_grad()
                    backward(model, transport.rank, 0, float("nan") if transport.rank else 1.0)
                    optimizer.step()
        assert torch.equal(flat(exchanged), start) and all(p.grad is None for p in exchanged)
        before = optimizer.exchanges
        train(model, optimizer, transport.rank, range(2, 4))
        assert optimizer.exchanges == before + 1 and is_equal_on_all(transport, exchanged)
        assert torch.isfinite(flat(exchanged)).all() and not torch.equal(flat(exchanged), start)

    run_local(2, main, LIMIT_S)


def test_the_scale_of_a_step_that_failed_is_forgotten() -> None:
    """A GradScaler takes back what it has set only from a step that returns."""

    def main(transport: LocalTransport) -> list[float]:
        model = nn.Linear(4, 4, bias=False)
        late = nn.Parameter(torch.ones(2), requires_grad=False)
        optimizer = DistributedOptimizer(SGD([*model.parameters(), late], lr=1.0), None, None, transport)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        moved = []
        for step in range(3):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 4)).sum()).backward()
            late.requires_grad_(step == 0)
            if step == 0:
                with pytest.raises(RuntimeError, match="began to require a gradient"):
                    scaler.step(optimizer)
            elif step == 1:
                scaler.step(optimizer)
            else:  # without the scaler
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.div_(scaler.get_scale())
                optimizer.step()
            if step < 2:
                scaler.update()
            moved.append(float((before - model.weight).mean().detach()))
        return moved

    assert run_local(2, main, LIMIT_S) == [[0.0, 1.0, 1.0]] * 2


def test_a_state_that_is_not_taken_over_is_not_taken_over_in_part() -> None:
    models = [network() for _ in range(2)]

    def main(transport: LocalTransport) -> None:
        model = models[transport.rank]
        optimizer = wrap(transport, model, None, every=2)
        train(model, optimizer, transport.rank, range(1))
        before: Tensor = optimizer.state[model[0].weight]["exp_avg"].clone()
        with pytest.raises(ValueError, match="within a round, after 1 of 2 steps"):
            broadcast_optimizer_state(optimizer, 0, transport)
        assert torch.equal(before, optimizer.state[model[0].weight]["exp_avg"])

    run_local(2, main, LIMIT_S)


class BackwardInside(SGD):
    """As LOMO and some of its relatives, and as some of SAM's."""

    def backward_and_step(self, loss: Tensor) -> None:
        loss.backward()
        self.step()
        self.zero_grad()

    def backward_nearby(self, model: nn.Module) -> None:
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model(torch.ones(1, 30)).sum().backward()
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.copy_(before)


def test_a_method_that_runs_the_backward_pass_itself_is_refused() -> None:
    def main(transport: LocalTransport) -> None:
        model = network()
        inner = BackwardInside(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), None, transport)
        with pytest.raises(RuntimeError, match=r"backward_and_step\(\) changed parameters by gradients that were not"):
            optimizer.backward_and_step(model(torch.ones(1, 30)).sum())
        optimizer.zero_grad()
        before = flat(model.parameters())
        optimizer.backward_nearby(model)
        assert torch.equal(flat(model.parameters()), before)
        optimizer.step()
        assert optimizer.exchanges == 1 and not torch.equal(flat(model.parameters()), before)

    run_local(2, main, LIMIT_S)
