"""Language models: every method trains one, bytes by the number of ranks, and what DeMo, Lion and Muon compute."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.accuracy_per_byte import report
from benchmarks.accuracy_per_byte.inner import Lion, make_inner
from benchmarks.accuracy_per_byte.methods import METHODS
from benchmarks.accuracy_per_byte.models import Transformer
from benchmarks.accuracy_per_byte.plans import PLANS
from benchmarks.accuracy_per_byte.records import Group, Record, Run
from benchmarks.accuracy_per_byte.steps import rate_at
from benchmarks.accuracy_per_byte.subjects import TEXT
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.accuracy_per_byte.training import begin, train
from benchmarks.methods.demo import cosines, from_tiles, to_tiles

STEPS = 16
RANKS = (2, 4)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in which the next character is nearly certain."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for name in ("tinyshakespeare_input", "wikitext2_valid", "wikitext2_test"):
        (folder / "text" / f"{name}.txt").write_text("to be or not to be, that is the question. " * 400)
    return folder


def run_of(method: str, workers: int = 4, task: str = "lm", seed: int = 0) -> Run:
    of = METHODS[method]
    ratio = of.fixed_ratio or 60.0 * of.every
    return Run(Group(task, workers, False, STEPS, method, ratio), of.first_rate(TASKS[task], STEPS), seed)


@pytest.mark.parametrize("method", ["demo", "sparseloco", "dense-rounds", "dense16", "lowrank4-muon", "lowrank4-lion"])
def test_a_method_trains_and_meets_its_ratio(method: str, data_dir: Path) -> None:
    run = run_of(method)
    start = begin(run, data_dir)
    before = start.data.evaluate(start.model)[1]
    record = train(run, data_dir)
    assert record["matrix_ratio"] == pytest.approx(run.group.ratio, rel=0.08)
    assert record["loss"] < before - 0.02


def test_bytes_of_a_rank_stay_with_ours_and_grow_with_rivals(data_dir: Path) -> None:
    """What all send to all others grows as the ranks do; ours only as (ranks - 1) / ranks."""
    sent = {}
    for method in ("demo", "sparseloco", "lowrank4"):
        for workers in RANKS:
            training = begin(run_of(method, workers), data_dir)
            for _ in range(training.method.every):
                training.step()
            sent[method, workers] = training.ledger.totals().wire_bytes / training.method.every
    rest = sum(p.numel() for p in training.model.parameters() if p.ndim < 2)  # goes dense, twice 4 bytes
    few, many = RANKS
    for method in ("demo", "sparseloco"):
        every = METHODS[method].every
        compressed = {w: sent[method, w] - 8 * rest * (w - 1) / w / every for w in RANKS}
        assert compressed[many] / compressed[few] == pytest.approx((many - 1) / (few - 1), rel=0.03)
    grown = (many - 1) / many * few / (few - 1)
    assert sent["lowrank4", many] / sent["lowrank4", few] == pytest.approx(grown, rel=0.05)


def test_tiles_are_rotated_and_come_back() -> None:
    matrix = torch.randn(26, 96, generator=torch.Generator().manual_seed(1))
    tiles = to_tiles(matrix)
    assert tiles.shape == (2, 26 * 48)
    assert torch.allclose(from_tiles(tiles, (26, 96)), matrix, atol=1e-5)
    assert tiles.norm() == pytest.approx(float(matrix.norm()), rel=1e-5)
    constant = to_tiles(torch.ones(26, 96))
    assert torch.allclose(constant[:, 0], torch.tensor(math.sqrt(26 * 48)))
    assert float(constant[:, 1:].abs().max()) < 1e-5
    assert torch.allclose(cosines(64) @ cosines(64).t(), torch.eye(64), atol=1e-6)


def test_lion_steps_by_the_sign_of_its_mean() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Lion([weight], lr=0.1, weight_decay=0.5)
    for gradient in ([1.0, -1.0], [-1.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # Second step: 0.9 * 0.01 - 0.1 < 0 and -0.9 * 0.01 - 0.1 < 0.
    first = np.array([0.95 - 0.1, 0.95 + 0.1])
    assert weight.detach().numpy() == pytest.approx(first * 0.95 + 0.1)


def test_muon_leaves_embeddings_and_vectors_to_adam() -> None:
    after = {}
    for inner in ("adam", "muon"):
        torch.manual_seed(0)
        model = Transformer(5, width=8, heads=2, context=4)
        optimizer = make_inner(inner, model, weight_decay=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        model(torch.tensor([[0, 1, 2, 3]])).square().mean().backward()
        optimizer.step()
        after[inner] = dict(model.named_parameters())
    differ = {name for name, p in after["adam"].items() if not torch.equal(p, after["muon"][name])}
    assert differ == {name for name, p in after["adam"].items() if name.startswith("blocks.") and p.ndim == 2}


def test_a_cosine_ends_at_a_tenth_and_a_line_at_zero() -> None:
    for task, end in (("lm", 0.0), ("wikitext", 0.1)):
        run = Run(Group(task, 4, False, 1000, "dense", 1.0), 0.5, 0)
        assert rate_at(run, 1000) == pytest.approx(0.5 * end)
        assert rate_at(run, 49) == pytest.approx(0.25, rel=0.05)
        assert max(rate_at(run, step) for step in range(1000)) == pytest.approx(0.5, rel=0.11)


def test_a_large_model_has_the_size_of_its_name() -> None:
    for task, parameters in (("wikitext", 0.28e6), ("wikitext1m", 1.0e6), ("wikitext10m", 10.9e6)):
        model = TASKS[task].make_model(256)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)


def record_of(run: Run) -> Record:
    traffic = {"matrix_ratio": run.group.ratio, "compression_ratio": 9.0, "wire_bytes_per_step": 1000.0}
    return {**run.labels, "acc": None, "loss": 2.0 + run.rate, "diverged": False, "nominal_ratio": 60.0, **traffic}


def test_the_report_of_text_has_the_ranks_and_no_images(tmp_path: Path) -> None:
    runs = [run_of("demo", workers, "lm64") for workers in (4, 16, 64)]
    runs += [Run(Group("mnist", 4, False, 400, "dense", 1.0), 0.2, 0)]
    text = report.write({run: record_of(run) for run in runs}, tmp_path, TEXT)
    assert "64 sequences" in text and "MNIST" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "lm64-ranks.png", "lm64.png"]
    assert {group.task for group in PLANS["language"]()} >= {"lm", "lm64", "wikitext", "finetune"}
