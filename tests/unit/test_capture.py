"""``hvd-sketch plan --gradient``: what each source captures of a gradient whose answer is known, at equal bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import hvd_sketch
from hvd_sketch import SketchConfig
from hvd_sketch.__main__ import app
from hvd_sketch.at_ratio import bytes_of, configurations
from hvd_sketch.commands.calls import as_call
from hvd_sketch.commands.capture import Comparison, energy_captured, load_gradient
from hvd_sketch.commands.plan_options import tensors_of

SHAPES = [(200, 300)]
DIM, RATIO, RANKS = 60_000, 40, 4


def model() -> torch.nn.Module:
    """What a user's factory makes."""
    return torch.nn.Linear(300, 200)


def spikes(count: int = 100) -> Tensor:
    """As many large coordinates, and little noise: a thousandth of the energy."""
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(DIM, generator=random)
    gradient *= (count * 100 / 1000 / DIM) ** 0.5
    gradient[torch.randperm(DIM, generator=random)[:count]] = 10.0
    return gradient


def rank_one() -> Tensor:
    """The matrix of one outer product: no coordinate is much larger than others."""
    random = torch.Generator().manual_seed(1)
    return torch.outer(torch.randn(200, generator=random), torch.randn(300, generator=random)).flatten()


def by_method(gradient: Tensor, has_shapes: bool = True) -> dict[str, float]:
    compared = Comparison(gradient, SHAPES if has_shapes else None, RATIO, RANKS)
    for captured in compared.best:
        assert bytes_of(captured.config, SHAPES, RANKS) == pytest.approx(8 * DIM / RATIO, rel=0.06)
    energies = [captured.energy for captured in compared.best]
    assert energies == sorted(energies, reverse=True)
    return {captured.name: captured.energy for captured in compared.best}


def test_of_spikes_what_looks_for_them_captures_all() -> None:
    found = by_method(spikes())
    assert min(found["nominate"], found["sketch"]) > 0.98
    assert found["paper"] > 0.8, "float32 leaves a table of an eighth of the cells"
    assert found["random"] < 0.3 and found["lowrank"] < 0.5


def test_of_one_outer_product_low_rank_captures_all() -> None:
    found = by_method(rank_one())
    assert found["lowrank"] > 0.95 and max(found["random"], found["paper"]) < 0.5
    assert "lowrank" not in by_method(rank_one(), has_shapes=False)


def test_the_best_of_many_tables_is_no_worse_than_the_default() -> None:
    gradient = torch.randn(DIM, generator=torch.Generator().manual_seed(2)) ** 3
    default = energy_captured(SketchConfig.for_wire_ratio(RATIO, DIM, RANKS), gradient, None)
    assert by_method(gradient)["sketch"] >= default > 0


def test_energy_of_exact_values_is_that_of_the_largest() -> None:
    gradient = torch.randn(DIM, generator=torch.Generator().manual_seed(3)) ** 3
    config = SketchConfig(k=500, candidates="nominate", value_bits=32)
    expected = gradient.square().topk(500).values.double().sum() / gradient.double().square().sum()
    assert energy_captured(config, gradient, None) == pytest.approx(float(expected), rel=1e-5)


def test_every_row_is_of_the_method_that_it_names() -> None:
    plain = configurations(SHAPES, RATIO, RANKS)
    gradient = torch.randn(DIM, generator=torch.Generator().manual_seed(2)) ** 3
    compared = Comparison(gradient, SHAPES, RATIO, RANKS)
    assert {captured.name for captured in compared.best} == plain.keys()
    for captured in compared.best:
        config = captured.config
        if isinstance(config, SketchConfig):
            divided = {name: getattr(config, name) for name in ("rows", "cols", "k", "oversample")}
            config = replace(plain[captured.name], **divided)
        assert captured.config == config, captured.name


@pytest.mark.parametrize(("options", "suffix"), [([], "npy"), (["--model", "tests.unit.test_capture:model"], "pt")])
def test_command_line(options: list[str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"gradient.{suffix}"
    if suffix == "npy":
        np.save(path, spikes().numpy())
    else:
        torch.save(spikes().requires_grad_(), path)
    assert torch.equal(load_gradient(path), spikes())
    arguments = ["plan", "--gradient", str(path), "--ratio", str(RATIO), *options]
    shown = CliRunner().invoke(app, arguments)
    table = [line for line in shown.output.splitlines() if not line.count("SketchConfig(")]
    assert shown.exit_code == 0 and max(map(len, table)) <= 80
    assert ("Low rank is not judged" in shown.output) is (not options)
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert record["coordinates"] == DIM
    sketch = next(each for each in record["captured"] if each["method"] == "sketch")
    config = SketchConfig(**sketch["config"])
    assert as_call(config) in shown.output


def deep() -> torch.nn.Module:
    """With small tensors, which go dense, and one that gets no gradient."""
    layers = torch.nn.Linear(100, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 50), torch.nn.Linear(40, 60)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("suffix", ["pt", "npy"])
def test_a_saved_gradient_is_of_the_tensors_that_are_compressed(suffix: str, tmp_path: Path) -> None:
    path, made = tmp_path / f"gradient.{suffix}", deep()
    with pytest.raises(ValueError, match=r"at least one of the 3 tensors .* after backward"):
        hvd_sketch.save_gradient(made.parameters(), path)
    first, norm, last, unused = made
    last(norm(first(torch.ones(2, 100)))).square().sum().backward()
    first.weight.grad = first.weight.grad.to_sparse()  # as of an embedding
    hvd_sketch.save_gradient(made.named_parameters(), path)
    first.weight.grad = first.weight.grad.to_dense()
    saved = load_gradient(path)
    assert saved.numel() == hvd_sketch.sketched_dim(made.parameters()) == 100 * 40 + 40 * 50 + 40 * 60
    expected = torch.cat([first.weight.grad.flatten(), last.weight.grad.flatten(), torch.zeros(unused.weight.numel())])
    assert torch.equal(saved, expected)
    shapes, _ = tensors_of(None, "tests.unit.test_capture:deep", saved)
    assert shapes == [(40, 100), (50, 40), (60, 40)], "and plan --model --gradient takes it"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(10), "not all zero"),
        (torch.full((10,), torch.nan), "finite"),
        (torch.ones(3, 4), "one vector of floats, got torch.float32 [3, 4]"),
        (torch.ones(3, dtype=torch.int64), "got torch.int64"),
        ({"weight": torch.ones(3)}, "got dict"),
        (model(), "cannot be read"),  # would run what is in the file
        (None, "cannot be read"),
    ],
)
def test_files_without_a_gradient_are_refused(value: object, told: str, tmp_path: Path) -> None:
    path = tmp_path / "gradient.pt"
    if value is None:
        path.write_text("no tensor")
    else:
        torch.save(value, path)
    with pytest.raises(ValueError, match=f"(?s)--gradient .*{told.replace('[', '.')}"):
        load_gradient(path)


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--params", "60e3"], "with --gradient no --params"), (["--model", "tests.unit.test_plan:model"], "has 60,000")],
)
def test_what_does_not_go_with_a_gradient_is_refused(options: list[str], told: str, tmp_path: Path) -> None:
    np.save(tmp_path / "gradient.npy", spikes().numpy())
    done = CliRunner().invoke(app, ["plan", "--gradient", str(tmp_path / "gradient.npy"), *options])
    assert done.exit_code == 2 and told in " ".join(done.output.replace("│", " ").split()), done.output
