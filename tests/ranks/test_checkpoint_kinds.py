"""Checkpoints across kinds of optimizers, and of modules that know their older states by a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvd_sketch import DistributedOptimizer, SketchConfig, SketchedAllreduce, load_checkpoint, save_checkpoint
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.rounds import COMPRESSIONS, adam, flat, loss_of, network, wrap
from tests.support.toy import LIMIT_S


class Versioned(nn.Linear):
    """Version 1 kept ten times the weights."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 10
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_module_knows_the_version_of_its_state(tmp_path: Path) -> None:
    models = [nn.Sequential(Versioned(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    for model in models:
        model.load_state_dict(models[0].state_dict())

    def main(transport: LocalTransport) -> None:
        model = models[transport.rank]
        model[1].running_mean.fill_(float(transport.rank))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), None, transport)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        save_checkpoint(tmp_path, model, optimizer)
        load_checkpoint(tmp_path, model, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    run_local(2, main, LIMIT_S)


def kinds(transport: LocalTransport, model: nn.Module, is_local: bool) -> Any:
    if is_local:
        return wrap(transport, model, COMPRESSIONS["nominate"], every=2)
    named = model.named_parameters()
    return DistributedOptimizer(adam(model), named, COMPRESSIONS["nominate"], transport, check_every=1)


@pytest.mark.parametrize("was_local", [True, False])
def test_the_other_kind_goes_on_without_residuals_and_alike_on_all_ranks(was_local: bool, tmp_path: Path) -> None:
    """Of LocalSteps each rank has moments of its own, and differences of parameters in its residual."""
    models = [[network(), network()] for _ in range(2)]

    def train(transport: LocalTransport, model: nn.Module, optimizer: Any) -> None:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, (transport.rank, step)).backward()
            optimizer.step()

    def main(transport: LocalTransport) -> list[torch.Tensor]:
        before, model = models[transport.rank]
        saved = kinds(transport, before, was_local)
        train(transport, before, saved)
        save_checkpoint(tmp_path, before, saved)
        optimizer = kinds(transport, model, not was_local)
        with pytest.raises(ValueError, match=r"residuals of the one are gradients.*Load with residuals=False"):
            load_checkpoint(tmp_path, model, optimizer)
        load_checkpoint(tmp_path, model, optimizer, residuals=False)
        assert torch.equal(flat(model.parameters()), flat(before.parameters()))
        assert not optimizer.exchange.residual.any()
        moments = flat(state["exp_avg"] for state in optimizer.inner.state.values())
        if was_local:
            with pytest.raises(ValueError, match="the state is one of LocalSteps"):
                optimizer.load_state_dict(saved.state_dict())
        train(transport, model, optimizer)  # where ranks have drifted apart, the next step says so
        return [moments, flat(model.parameters())]

    first, second = run_local(2, main, LIMIT_S)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_thresholds_of_another_configuration_are_not_taken_over() -> None:
    """A rank's own where ranks nominate, and equal on all where the largest of several sums are chosen."""
    dim = 4000

    def gradient(rank: int, step: int) -> torch.Tensor:  # rank 1: zeros so far
        return torch.randn(dim, generator=torch.Generator().manual_seed(10 * step + rank)) * (rank == 0)

    def main(transport: LocalTransport) -> torch.Tensor:
        first = SketchedAllreduce(SketchConfig(k=100, candidates="nominate"), dim, transport)
        for step in range(3):
            first.step(gradient(transport.rank, step))
        second = SketchedAllreduce(SketchConfig.paper(k=100, cols=200), dim, transport)
        second.load_state_dict(first.state_dict())
        return second.step(gradient(transport.rank, 3)).indices

    ours, theirs = run_local(2, main, LIMIT_S)
    assert ours.numel() == 100 and torch.equal(ours, theirs)
