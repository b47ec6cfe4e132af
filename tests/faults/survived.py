"""Faults that all ranks survive: each is refused, skipped or mended on all of them, and then training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from hvd_sketch import DistributedOptimizer, LowRankConfig, SketchConfig, SketchedAllreduce
from hvd_sketch.exchange import setup
from hvd_sketch.transport import Transport
from tests.support.saving import Job, fail_to_save
from tests.support.toy import Toy, little, wrap

ODD_RANK = 1


def check_all(transport: Transport, folder: Path) -> int:
    """Run every check; returns how many ran."""
    checks: list[Callable[[Transport, Path], None]] = [
        *(check_uneven_data, check_setup_mismatches, check_late_mismatches, check_gradients_that_are_not_finite),
        *(check_overflow, check_damaged_files, check_full_disk),
    ]
    for check in checks:
        check(transport, folder / check.__name__)
        transport.barrier()
    return len(checks)


def check_uneven_data(t: Transport, folder: Path) -> None:
    model = Toy()
    optimizer = wrap(t, model, little())
    with optimizer.join():
        for step in range(2 + 3 * (t.rank == ODD_RANK)):
            optimizer.zero_grad()
            model.backward(t.rank, step)
            optimizer.step()
    assert_equal_everywhere(t, model)


def check_setup_mismatches(t: Transport, folder: Path) -> None:
    """One rank is set up differently: all are told which and what, and a set-up without it is a good one."""

    def arguments() -> dict[str, Any]:
        model = Toy()
        return {"optimizer": SGD(model.parameters()), "named_parameters": model.named_parameters(), "sketch": little()}

    wider = nn.Parameter(torch.zeros(9, 8))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sketch": little(seed=1)}, "config.seed: 0 on "),
        ({"sketch": None}, "exchange: SketchedAllreduce on "),
        ({"sketch": LowRankConfig(rank=1)}, "exchange: SketchedAllreduce on "),
        ({"optimizer": SGD([wider]), "named_parameters": None}, "dim: 60 on "),
        ({"optimizer": Adam(Toy().parameters()), "named_parameters": None}, "wrapped optimizer: SGD on "),
        ({"optimizer": SGD(Toy().parameters(), lr=0.5), "named_parameters": None}, "lr of group 0 of the wrapped opt"),
        ({"check_every": 3}, "check_every: 100 on "),
        ({"check_every": "often"}, "check_every must be an integer"),
    ]
    for odd, told in cases:
        given = arguments() | (odd if t.rank == ODD_RANK else {})
        with pytest.raises(ValueError) as caught:
            DistributedOptimizer(**given, transport=t)
        assert told in str(caught.value) and (t.rank == ODD_RANK or "rank 1" in str(caught.value)), caught.value
    with another_version(t.rank == ODD_RANK), pytest.raises(ValueError, match=r"hvd_sketch: .*0\.0\.9 on rank 1"):
        DistributedOptimizer(**arguments(), transport=t)
    DistributedOptimizer(**arguments(), transport=t)


def check_late_mismatches(t: Transport, folder: Path) -> None:
    """Another kind of checkpoint, or an older one, on one rank: no rank takes the step."""
    job = Job(t, little(momentum=0.5))
    job.train(range(2))
    old = job.optimizer.state_dict()
    job.train(range(2, 4))
    own, everyones = job.optimizer.state_dict(), job.optimizer.state_dict(consolidated=True)
    plain = job.optimizer.inner.state_dict()
    cases = [
        (everyones, r"different kinds of checkpoints.*own on rank.* consolidated on rank 1"),
        (plain, r"different kinds of checkpoints.*own on rank.* plain on rank 1"),
        (old, r"at different steps, in rank order \[4, 2"),
    ]
    for odd, told in cases:
        job.optimizer.load_state_dict(odd if t.rank == ODD_RANK else own)
        with pytest.raises(RuntimeError, match=told):
            job.train(range(4, 5))
    job.optimizer.load_state_dict(own)
    job.train(range(4, 5))
    assert_equal_everywhere(t, job.model)


def check_gradients_that_are_not_finite(t: Transport, folder: Path) -> None:
    """NaN and both infinities, in a sketched and in a dense tensor of one rank: nothing changes on any."""
    job = Job(t, little(momentum=0.5))
    job.train(range(2))
    bad = [(value, name) for value in ("nan", "inf", "-inf") for name in ("weight", "bias")]
    for skipped, (value, name) in enumerate(bad, 1):
        before = job.tensors()
        job.optimizer.zero_grad()
        job.model.backward(t.rank, 2)
        if t.rank == ODD_RANK:
            getattr(job.model, name).grad.view(-1)[1] = float(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            job.optimizer.step()
        assert all(map(torch.equal, before, job.tensors()))
        assert job.optimizer.skipped_steps == skipped
        assert all(bool(gradient.isnan().all()) for gradient in job.model.gradients())
    job.train(range(3, 5))
    assert_equal_everywhere(t, job.model)


def check_overflow(t: Transport, folder: Path) -> None:
    """Sums beyond float32 are sent in parts: within 50 steps everything has arrived, and nothing is lost."""
    exchange = SketchedAllreduce(SketchConfig.paper(cols=200, k=30, momentum=0.0), 1000, t)
    sent, produced = torch.zeros(2, 1000, dtype=torch.float64)
    for step in range(50):
        gradient = torch.zeros(1000)
        if step < 3:
            gradient[::40] = 2.0**126
            produced += gradient.double()
        update = exchange.step(gradient)
        assert not update.skipped
        sent[update.indices] += update.values.double()
    kept = t.allreduce_(exchange.residual.double()) / t.size
    torch.testing.assert_close(sent + kept, produced, rtol=1e-6, atol=0.0)
    assert float(kept.abs().max()) <= 2.0**126 * 1e-6, "it has recovered"


def check_damaged_files(t: Transport, folder: Path) -> None:
    job = Job(t, little(momentum=0.5))
    job.train(range(1))
    older = job.save(folder)
    job.train(range(1, 2))
    newer = job.save(folder)
    for damage in (lambda whole: b"", lambda whole: whole[:-1000], flip):
        for name in (f"rank-{ODD_RANK}.pt", "shared.pt", "manifest.json"):
            with damaged(t, newer / name, damage):
                before = job.tensors()
                with pytest.raises(ValueError) as caught:
                    job.load(folder)
                assert name in str(caught.value) and f"go on from step 1, {older.name}" in str(caught.value)
                assert all(map(torch.equal, before, job.tensors()))
    loaded = job.load(folder)
    assert loaded is not None and loaded.step == 2


def check_full_disk(t: Transport, folder: Path) -> None:
    result = fail_to_save(t, str(folder))
    assert f"rank-{t.size - 1}.pt was not written" in result["told"]
    assert result["left"] == [result["first"]] and result["step"] == 2


def flip(whole: bytes) -> bytes:
    """With a bit changed in every 50th byte: some of a file is padding."""
    content = bytearray(whole)
    for place in range(25, len(content), 50):
        content[place] ^= 16
    return bytes(content)


@contextmanager
def damaged(t: Transport, path: Path, damage: Callable[[bytes], bytes]) -> Iterator[None]:
    """A file as damage leaves it, until all ranks have looked at it."""
    whole = path.read_bytes()
    t.barrier()
    if t.rank == 0:
        path.write_bytes(damage(whole))
    t.barrier()
    yield
    t.barrier()
    if t.rank == 0:
        path.write_bytes(whole)
    t.barrier()


@contextmanager
def another_version(is_odd: bool) -> Iterator[None]:
    ours = setup.__version__
    setup.__version__ = "0.0.9" if is_odd else ours
    try:
        yield
    finally:
        setup.__version__ = ours


def assert_equal_everywhere(t: Transport, model: nn.Module) -> None:
    own: Tensor = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    every = t.allgather(own.unsqueeze(0))
    assert bool((every == every[0]).all())
