"""The CIFAR-10 experiment: simulated workers equal real ranks to the bit, and what a run is made of."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.image_data import Images
from benchmarks.paper.cifar10 import SCALES, Choice, check_sizes, choices, config_of
from benchmarks.paper.cifar10_training import Cifar10Training, Task
from benchmarks.paper.model_exchange import METHODS
from benchmarks.paper.resnet9 import CUTOUT, PAD, Augmentation, ResNet9
from hvd_sketch.transport import Transport
from tests.support.harness import launch, run_command
from tests.support.paper import log_of_a_resumption, runs

WIDTH, BATCH, WORKERS, STEPS = 2, 32, 4, 5


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A blob per class in noise: uint8 [count, 3072] and labels uint8 [count]."""
    blobs = np.random.default_rng(0).integers(0, 256, (10, 3072))
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, count, dtype=np.uint8)
    return ((blobs[labels] + draw.integers(0, 256, (count, 3072))) // 2).astype(np.uint8), labels


def tiny_task(method: str, seed: int = 0) -> Task:
    def standardised(count: int, seed: int) -> tuple[Tensor, Tensor]:
        pixels, labels = images(count, seed)
        scaled = torch.from_numpy(pixels.astype(np.float32)).view(-1, 3, 32, 32).sub(127).div(64)
        return scaled, torch.from_numpy(labels.astype(np.int64))

    data = Images("cifar10", *standardised(100, 1), *standardised(40, 2))
    return Task(method, config_of({"ratio": 10, "momentum": 0.9}, WIDTH), data, WIDTH, STEPS, BATCH, 0.1, seed)


def train(training: Cifar10Training, steps: int) -> dict[str, Any]:
    """Losses of all steps, the weights and the measurement after them, and the traffic."""
    losses = [training.step() for _ in range(steps)]
    weights = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return {"losses": losses, "weights": weights, "measured": training.measure(), "traffic": training.traffic()}


def train_on_ranks(transport: Transport) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    tasks = {method: tiny_task(method) for method in ("dense", "sketched")}
    return {method: train(Cifar10Training(task, transport), STEPS) for method, task in tasks.items()}


@pytest.mark.multiprocess
def test_real_ranks_equal_the_simulation() -> None:
    """Four ranks under mpirun: the loss of every step, all weights, the measurement and the bytes."""
    ranks = launch("mpi", WORKERS, "tests.paper.test_cifar10:train_on_ranks", timeout_s=120)
    for method in ("dense", "sketched"):
        simulated = train(Cifar10Training(tiny_task(method), WORKERS), STEPS)
        losses = torch.tensor([rank[method]["losses"] for rank in ranks], dtype=torch.float64).mean(dim=0)
        assert losses.tolist() == simulated["losses"]
        for rank in ranks:
            assert torch.equal(rank[method]["weights"], simulated["weights"])
            assert rank[method]["measured"] == simulated["measured"]
            assert rank[method]["traffic"] == simulated["traffic"]
        assert simulated["losses"][-1] < simulated["losses"][0]


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_checkpoint_gives_the_same_figures(method: str) -> None:
    make = partial(Cifar10Training, tiny_task(method), WORKERS)
    whole = train(make(), STEPS)
    first, second = make(), make()
    train(first, 2)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer))
    rest = train(second, STEPS - 2)
    assert rest["losses"] == whole["losses"][2:] and torch.equal(rest["weights"], whole["weights"])
    assert rest["measured"] == whole["measured"] and rest["traffic"] == whole["traffic"]


def test_how_many_coordinates_are_updated_and_sent() -> None:
    tasks = {method: tiny_task(method) for method in METHODS}
    found = {method: train(Cifar10Training(task, WORKERS), 2) for method, task in tasks.items()}
    updated = {method: result["measured"]["updated_per_step"] for method, result in found.items()}
    total = sum(p.numel() for p in ResNet9(WIDTH).parameters())
    dense = sum(p.numel() for p in ResNet9(WIDTH).parameters() if p.ndim == 1)
    k = tasks["sketched"].config.k
    assert updated["dense"] == total and updated["sketched"] == updated["true_topk"] == k + dense
    assert k + dense < updated["local_topk"] <= WORKERS * k + dense
    assert found["true_topk"]["traffic"].wire_bytes_per_step is None
    assert found["dense"]["traffic"].paper_compression_ratio == 1


@pytest.mark.parametrize("ratio", [10, 20])
def test_the_ratio_is_that_of_the_whole_model(ratio: int) -> None:
    total = sum(p.numel() for p in ResNet9(8).parameters())
    config = config_of({"ratio": ratio}, 8)
    dense = sum(p.numel() for p in ResNet9(8).parameters() if p.ndim == 1)
    assert 2 * total / (config.paper_floats(total - dense) + 2 * dense) == pytest.approx(ratio, rel=0.01)


def test_the_rate_is_the_papers() -> None:
    task = Task("dense", config_of({"ratio": 10}, 8), tiny_task("dense").data, 8, 24 * 98, 512, 0.4, 0)
    rates = [task.rate_at(step) for step in range(task.steps)]
    assert max(rates) == pytest.approx(0.4, rel=0.01) and np.argmax(rates) in (5 * 98 - 1, 5 * 98)
    assert 0 < rates[0] < 0.001 and 0 < rates[-1] < 0.001
    rises = np.diff(rates)
    assert np.allclose(rises[: 5 * 98 - 1], rises[0]) and np.allclose(rises[5 * 98 :], rises[-1])


def test_augmentation_pads_crops_flips_and_cuts() -> None:
    source = torch.randn(6, 3, 32, 32)
    index = torch.tensor([3, 1, 1, 5])
    changes = Augmentation.draw(np.random.default_rng(1), 4)
    assert 0 < changes.flips.sum() < 4
    changed = changes.apply(source, index)
    for i, image in enumerate(source[index].numpy()):
        padded = np.pad(image, ((0, 0), (PAD, PAD), (PAD, PAD)), mode="reflect")
        row, col = (changes.shifts[i] + PAD).tolist()
        expected = padded[:, row : row + 32, col : col + 32]
        expected = expected[:, :, ::-1].copy() if changes.flips[i] else expected.copy()
        top, left = changes.cuts[i].tolist()
        expected[:, top : top + CUTOUT, left : left + CUTOUT] = 0
        assert np.array_equal(changed[i].numpy(), expected)
    assert torch.equal(changes.part(1, 3).apply(source, index[1:3]), changed[1:3])


def test_augmentation_reaches_every_place() -> None:
    changes = Augmentation.draw(np.random.default_rng(0), 2000)
    assert set(changes.shifts.flatten().tolist()) == set(range(-PAD, PAD + 1))
    assert set(changes.cuts.flatten().tolist()) == set(range(32 - CUTOUT + 1))


def test_statistics_depend_on_weights_and_images_alone() -> None:
    torch.manual_seed(0)
    model, batch = ResNet9(WIDTH), torch.randn(64, 3, 32, 32)
    in_training = model(batch)
    model.set_statistics(batch)
    first = model.eval()(batch)
    assert torch.allclose(first, in_training, atol=0.02)  # the variance of a population, not of a sample
    model.train()(torch.randn(64, 3, 32, 32) * 10)  # leaves no trace
    assert torch.equal(model.eval()(batch), first)


def test_width_64_is_the_papers_model() -> None:
    assert sum(p.numel() for p in ResNet9(64).parameters()) == pytest.approx(6.57e6, rel=0.01)


def test_choices_cover_the_experiment() -> None:
    for name, scale in SCALES.items():
        every = list(choices(list(METHODS), scale, ["accuracy", "workers"]))
        assert {choice.method for choice in every if choice.part == "accuracy"} == {"dense", "true_topk", "sketched"}
        sweep = {(choice.method, choice.workers) for choice in every if choice.part == "workers"}
        assert sweep == {(method, w) for method in ("sketched", "local_topk") for w in scale.workers}
        labels = [tuple(Choice.labels(choice, 0).items()) for choice in every]
        assert len(set(labels)) == len(labels), name


def test_sizes_that_do_not_fit_are_refused() -> None:
    scale = dataclasses.replace(SCALES["small"], sweep_batch=128, workers=[4, 48])
    with pytest.raises(ValueError, match=r"\[48\] workers"):
        check_sizes(scale)
    with pytest.raises(ValueError, match="100 training images"):
        check_sizes(dataclasses.replace(SCALES["small"], train_images=100))


def write_cifar10(folder: Path) -> None:
    """CIFAR-10's files with few images."""
    for name, count in (*((f"data_batch_{i}", 30) for i in range(1, 6)), ("test_batch", 20)):
        pixels, labels = images(count, seed=count)
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels, pixels]).astype(np.uint8).tobytes())


@pytest.mark.multiprocess
def test_resuming_after_ctrl_c_gives_the_same_figures(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    sizes = "--train-images 100 --epochs 6 --batch 8 --sweep-batch 8 --width 2 --workers 4 --seeds 1"
    base = [sys.executable, "-m", "benchmarks.paper.cifar10", "--data-dir", str(tmp_path), *sizes.split()]
    base += ["--parts", "accuracy", "--methods", "sketched", "--ratios", "5"]
    log = log_of_a_resumption(base, tmp_path, '"step": 18')
    assert log[-1]["wire_bytes"] == pytest.approx(72 * runs(tmp_path / "whole.json")[0]["wire_bytes_per_step"])


def test_a_whole_experiment_and_its_figure(tmp_path: Path) -> None:
    """From CIFAR-10's files to the figure, every method once and in the sweep."""
    write_cifar10(tmp_path)
    figures = tmp_path / "cifar10.json"
    sizes = [
        "--train-images",
        "100",
        "--epochs",
        "1",
        "--batch",
        "8",
        "--width",
        "2",
        "--sweep-steps",
        "2",
        "--sweep-batch",
        "8",
    ]
    common = ["--data-dir", str(tmp_path), "--seeds", "2", "--json", str(figures), "--workers", "2", "4"]
    status, output = run_command(
        [sys.executable, "-m", "benchmarks.paper.cifar10", *common, *sizes], timeout_s=120, OMP_NUM_THREADS="1"
    )
    assert status == 0, output
    results = json.loads(figures.read_text())
    assert results["settings"]["test_images"] == 20
    assert len(results["runs"]) == 2 * (1 + 2 + 2) + 2 * 2
    assert all(run["steps"] == (12 if run["part"] == "accuracy" else 2) for run in results["runs"])
    again = [sys.executable, "-m", "benchmarks.paper.cifar10", *common, *sizes, "--resume"]
    status, output = run_command(again, timeout_s=120, OMP_NUM_THREADS="1")
    assert status == 0 and json.loads(figures.read_text())["runs"] == results["runs"], output
    status, output = run_command([sys.executable, "-m", "benchmarks.paper.make_figures", str(figures)], timeout_s=120)
    assert status == 0, output
    assert (tmp_path / "cifar10.png").stat().st_size > 1000
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 5 + 1 + 4 and lines[1].startswith("| dense | all | 2 |")
