"""Lightning's wrapper inherits from an optimizer's class and has copies of its attributes: both are one optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_sketch import DistributedOptimizer, LocalSteps, SketchConfig
from hvd_sketch.transport import LocalTransport, run_local

RANKS, STEPS, WIDTH = 2, 7, 12


def inherited(optimizer: Any) -> Any:
    """Another object of the same optimizer, made as Lightning makes its own."""
    kind = type(optimizer)
    other = object.__new__(type(f"Inherited{kind.__name__}", (kind,), {}))
    other.__dict__.update(optimizer.__dict__)
    return other


def compression() -> SketchConfig:
    return SketchConfig(k=20, candidates="nominate", dense_below=0)


def averaging(model: nn.Module, transport: LocalTransport) -> DistributedOptimizer:
    return DistributedOptimizer(torch.optim.AdamW(model.parameters(), 0.01), None, compression(), transport)


def local_steps(model: nn.Module, transport: LocalTransport) -> LocalSteps:
    return LocalSteps(torch.optim.AdamW(model.parameters(), 0.01), None, compression(), transport, every=3)


def train(build: Any, wrap: Any, transport: LocalTransport) -> tuple[list[Tensor], int]:
    """Steps by the optimizer, as Lightning's strategy makes them; all else by the user's object."""
    model = nn.Linear(WIDTH, WIDTH)
    of_all = torch.Generator().manual_seed(0)  # torch's own is one for all threads
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=of_all) / WIDTH)
    optimizer = build(model, transport)
    users = wrap(optimizer)
    generator = torch.Generator().manual_seed(transport.rank)
    for step in range(STEPS):
        batch = torch.randn(4, WIDTH, generator=generator)
        users.zero_grad()
        if isinstance(optimizer, LocalSteps):
            model(batch).pow(2).mean().backward()
            optimizer.step()
            if step == 3:
                users.load_state_dict(users.state_dict())  # within a round
            if step == 4:
                users.sync()
        else:
            with users.ahead():
                model(batch).pow(2).mean().backward()
                if step % 3 == 2:
                    users.synchronize()
                    with users.skip_synchronize():
                        optimizer.step()
                else:
                    optimizer.step()
    for name, value in optimizer.__dict__.items():
        if name == "_known":
            continue  # made from the same parameters
        assert users.__dict__[name] is value, f"{name} is another one for the other object"
    return [p.detach() for p in model.parameters()], optimizer.ledger.totals().collectives


@pytest.mark.parametrize("build", [averaging, local_steps])
def test_both_objects_are_one_optimizer(build: Any) -> None:
    alone = run_local(RANKS, lambda t: train(build, lambda o: o, t), timeout_s=60)
    for rank, (parameters, collectives) in enumerate(run_local(RANKS, lambda t: train(build, inherited, t), 60)):
        assert all(map(torch.equal, parameters, alone[rank][0]))
        assert collectives == alone[rank][1]
