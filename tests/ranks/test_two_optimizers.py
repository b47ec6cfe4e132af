"""One model with two optimizers, each wrapped: Muon for matrices, AdamW for all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hvd_sketch import DistributedOptimizer, LocalSteps, LowRankConfig, SketchConfig, join, recommended
from hvd_sketch.transport import LocalTransport, run_local

RANKS, STEPS, LIMIT_S = 3, 6, 60


def model_of_seed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64), nn.Linear(64, 50))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_side_by_side() -> None:
    models = [model_of_seed() for _ in range(RANKS)]
    texts = [torch.randint(50, (64,), generator=torch.Generator().manual_seed(rank)) for rank in range(RANKS)]

    def main(transport: LocalTransport) -> tuple[list[float], float, list[torch.Tensor]]:
        model = models[transport.rank]
        named = dict(model.named_parameters())
        hidden = {name: named.pop(name) for name in ("1.weight", "2.weight")}
        compression = recommended(hidden.values(), 20, RANKS, "muon")
        muon = torch.optim.Muon(hidden.values(), lr=0.02, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(named.values(), lr=0.02)
        optimizers = [
            DistributedOptimizer(muon, hidden.items(), compression=compression, transport=transport),
            DistributedOptimizer(adam, named.items(), compression=LowRankConfig(ratio=20), transport=transport),
        ]
        losses = []
        for _ in range(STEPS):
            model.zero_grad()
            text = texts[transport.rank]
            loss = nn.functional.cross_entropy(model(text), (text * 7 + 3) % 50)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(loss.detach()))
        return losses, optimizers[0].ledger.compression_ratio(), [p.detach() for p in model.parameters()]

    results = run_local(RANKS, main, LIMIT_S)
    for losses, ratio, parameters in results:
        assert losses[-1] < losses[0] - 0.3 and ratio == pytest.approx(20, rel=0.1)
        assert all(map(torch.equal, parameters, results[0][2]))


COMPRESSIONS = (None, LowRankConfig(rank=2), SketchConfig(k=64, candidates="nominate", dense_below=0))


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    generator = torch.Generator().manual_seed(1)  # the ranks are threads and share torch's own generator
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 6
    return model


def train(model: nn.Module, optimizers: list[Any], rank: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(8, 32, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def wrapped(model: nn.Module, compression: Any, transport: LocalTransport, every: Sequence[int] = (1, 1)) -> list[Any]:
    optimizers: list[Any] = []
    for (name, parameter), own_every in zip(model.named_parameters(), every, strict=True):
        inner, named = torch.optim.SGD([parameter], lr=0.05, momentum=0.9), [(name, parameter)]
        if own_every == 1:
            optimizers.append(DistributedOptimizer(inner, named, compression, transport))
        else:
            optimizers.append(LocalSteps(inner, named, compression, transport, every=own_every))
    return optimizers


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["dense", "low rank", "nominate"])
@pytest.mark.parametrize("batches", [(3, 5, 4), (5, 0, 5), (0, 0, 0), (4, 4, 4)])
@pytest.mark.filterwarnings("ignore:.*has not been shown")
def test_ranks_with_different_numbers_of_batches(batches: tuple[int, ...], compression: Any, every: int) -> None:
    def main(transport: LocalTransport) -> tuple[list[torch.Tensor], list[int]]:
        model = two_layers()
        optimizers = wrapped(model, compression, transport, (every, every))
        with join(*optimizers):
            train(model, optimizers, transport.rank, batches[transport.rank])
        parameters = [p.detach().clone() for p in model.parameters()]
        train(model, optimizers, transport.rank, every)
        return [*parameters, *(p.detach() for p in model.parameters())], [o.exchanges for o in optimizers]

    results = run_local(RANKS, main, LIMIT_S)
    for parameters, exchanges in results:
        assert all(map(torch.equal, parameters, results[0][0])) and exchanges == results[0][1]
        assert exchanges[0] == exchanges[1] and (every > 1 or exchanges[0] == max(batches) + 1)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["dense", "low rank", "nominate"])
@pytest.mark.filterwarnings("ignore:.*has not been shown")
def test_another_order_on_one_rank_is_refused_on_all(compression: Any) -> None:
    """Their gradients are of one shape, and their sums would be nobody's."""

    def main(transport: LocalTransport) -> list[bool]:
        model = two_layers()
        optimizers = wrapped(model, compression, transport)
        train(model, optimizers, transport.rank, 2)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(RuntimeError, match="Step several optimizers in the same order on every rank"):
            train(model, optimizers[:: -1 if transport.rank == 1 else 1], transport.rank, 1)
        return [torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True)]

    assert run_local(RANKS, main, LIMIT_S) == [[True, True]] * RANKS


def test_blocks_inside_one_another_are_refused_where_both_step() -> None:
    def main(transport: LocalTransport) -> None:
        model = two_layers()
        first, second = wrapped(model, None, transport)
        with first.join():
            for _ in range(2):  # each epoch the outer one steps once
                with second.join():
                    train(model, [second], transport.rank, 2 + transport.rank)
                first.step()
        with first.join(), second.join():
            train(model, [first, second], transport.rank, 2 + transport.rank)

    with pytest.raises(RuntimeError, match=r"put the loop into 'with hvd_sketch.join\(a, b\):'"):
        run_local(2, main, LIMIT_S)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("stepped", "told"),
    [
        ((1, 0), r"stepped optimizer 2 \((\d) exchanges\), optimizer 1 \(\1 exchanges\): name them in that order"),
        ((0, 1, 1), "step each once for every batch"),
        ((0,), "step each once for every batch"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has not been shown")
def test_another_order_than_the_loops_is_refused(stepped: Sequence[int], told: str, every: int) -> None:
    """The two layers have equal shapes: nobody else would notice."""

    def main(transport: LocalTransport) -> None:
        model = two_layers()
        optimizers = wrapped(model, None, transport, (every, every))
        with pytest.raises(RuntimeError, match=told), join(*optimizers):
            train(model, [optimizers[number] for number in stepped], transport.rank, 4)

    run_local(2, main, LIMIT_S)


def test_what_cannot_be_joined_is_refused() -> None:
    def main(transport: LocalTransport) -> None:
        model = two_layers()
        first, second = wrapped(model, None, transport, (1, 2))
        for given, told in (((first, second), r"every=\[1, 2\]"), ((first, first), "got 2 of"), ((), "got 0 of")):
            with pytest.raises(ValueError, match=told), join(*given):
                pass
        with pytest.raises(TypeError, match="got SGD"), join(first.inner):
            pass

    run_local(1, main, LIMIT_S)
