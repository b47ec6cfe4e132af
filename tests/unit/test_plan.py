"""``hvd-sketch plan``: its bytes and collectives are those of the ledger, its advice is what its own figures say."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.methods import LibraryAllreduce, PowerSGD
from hvd_sketch import SketchConfig
from hvd_sketch.__main__ import app
from hvd_sketch.commands import plan, plan_figure
from hvd_sketch.commands.plan import Plan, bits_per_s, shapes_of_size
from hvd_sketch.commands.styles import STYLES
from hvd_sketch.cost import CARRIERS, NANOSECONDS, Network, break_even, bytes_of, configurations, kept_bytes, methods
from hvd_sketch.exchange.base import Exchange
from hvd_sketch.model.routes import make_exchange
from hvd_sketch.transport import LocalTransport, run_local

LIMIT_S = 60
RANKS = 4
SHAPES = [(200, 300), (400, 250), (64, 32, 3, 3)]
DIM = sum(map(prod, SHAPES))
GIGABIT = Network(RANKS, 1e9 / 8, 50e-6, CARRIERS["mpi"])


def model() -> torch.nn.Module:
    """What a user's factory makes."""
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10))


def stepped(exchange: Exchange, transport: LocalTransport, steps: int = 5) -> tuple[float, float, float]:
    """Bytes sent and collectives per step, and bytes kept."""
    random = torch.Generator().manual_seed(transport.rank)
    for _ in range(steps):
        exchange.step(torch.randn(DIM, generator=random).pow_(3))
    totals = exchange.ledger.totals()
    kept = sum(tensor.nbytes for tensor in exchange.state_dict().values() if isinstance(tensor, torch.Tensor))
    return totals.wire_bytes / steps, totals.collectives / steps, kept


@pytest.mark.parametrize("name", ["lowrank", "nominate", "random", "sketch", "paper"])
def test_ours_are_what_the_ledger_counts(name: str) -> None:
    config = configurations(SHAPES, 50, RANKS)[name]

    def main(transport: LocalTransport) -> tuple[float, float, float]:
        exchange = make_exchange(config, DIM, transport, torch.device("cpu"), shapes=SHAPES)
        return stepped(exchange, transport)

    planned = methods(SHAPES, 50, GIGABIT)[name]
    for sent, collectives, kept in run_local(RANKS, main, LIMIT_S):
        assert planned.sent_bytes == pytest.approx(sent, rel=0.05)
        assert abs(planned.collectives - collectives) <= 1
        table = 4 * config.rows * config.cols if isinstance(config, SketchConfig) and config.has_table else 0
        assert planned.kept_bytes == kept_bytes(config, SHAPES) == pytest.approx(kept + table, rel=0.02)
    assert bytes_of(config, SHAPES, RANKS) == pytest.approx(8 * DIM / 50, rel=0.05)


@pytest.mark.parametrize(("name", "kind"), [("dense", LibraryAllreduce), ("powersgd", PowerSGD)])
def test_peers_are_what_the_ledger_counts(name: str, kind: type[Exchange]) -> None:
    parameters = [(f"matrix {number}", shape, "float32") for number, shape in enumerate(SHAPES)]

    def main(transport: LocalTransport) -> float:
        return stepped(kind(None, DIM, transport, parameters=parameters), transport)[0]

    assert run_local(RANKS, main, LIMIT_S)[0] == pytest.approx(methods(SHAPES, 50, GIGABIT)[name].sent_bytes, rel=0.01)


def test_below_break_even_ours_is_faster_and_above_it_dense_is() -> None:
    found = methods(shapes_of_size(25_000_000), 50, GIGABIT)
    ours, dense = replace(found["nominate"], local_s=0.3), found["dense"]
    rate = break_even(ours, GIGABIT, [dense])
    for factor, is_faster in ((0.9, True), (1.1, False)):
        there = replace(GIGABIT, bytes_per_s=factor * rate)
        assert (ours.seconds(there) < dense.seconds(there)) is is_faster
    assert break_even(replace(ours, local_s=10.0, sent_bytes=dense.sent_bytes), GIGABIT, [dense]) == 0
    assert break_even(replace(ours, local_s=0.0), GIGABIT, [replace(dense, local_s=1.0)]) == math.inf


@pytest.mark.parametrize(
    ("rate", "nanoseconds", "told"),
    [
        ("1gbit", {}, "Compress: with "),
        ("400gbit", {"nominate": 9.0, "lowrank": 9.0}, "Stay dense: "),
        ("1gbit", {"powersgd": 0.0, "lowrank": 40.0, "nominate": 40.0}, "Use PowerSGD"),
    ],
)
def test_advice(rate: str, nanoseconds: dict[str, float], told: str) -> None:
    network = replace(GIGABIT, bytes_per_s=bits_per_s(rate) / 8)
    made = Plan(shapes_of_size(25_000_000), network, 150, 0.0, {**NANOSECONDS, **nanoseconds})
    assert made.advice.startswith(told)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.exit_code, done.output


def test_table_fits_80_columns_and_json_says_the_same() -> None:
    options = ["--params", "90e6", "--ranks", "16", "--bandwidth", "1gbit", "--latency", "50us", "--backward", "0.12s"]
    status, table = run(*options)
    assert status == 0 and max(map(len, table.splitlines())) <= 80
    status, text = run(*options, "--json")
    record = json.loads(text)
    assert status == 0 and record["coordinates"] == 90e6 and record["ranks"] == 16
    assert record["advice"].split(":")[0] in table
    dense = record["methods"]["dense"]
    assert dense["exchange_s"] == pytest.approx(8 * 90e6 * 15 / 16 / 125e6, rel=0.2)
    assert dense["step_s"] == pytest.approx(dense["exchange_s"] + 0.12)


def test_a_users_model_and_this_machine() -> None:
    status, text = run("--model", "tests.unit.test_plan:model", "--calibrate", "--ratio", "20", "--json")
    record = json.loads(text)
    assert status == 0 and record["coordinates"] == 300 * 200 + 200 * 10
    assert 0 < record["methods"]["nominate"]["local_s"] < 1
    assert record["methods"]["nominate"]["local_s"] != 1e-9 * NANOSECONDS["nominate"] * record["coordinates"]


def test_a_figure_of_two_panels_has_every_method(tmp_path: Path) -> None:
    axes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_figure, "_mark", lambda panel, value: axes.append((panel, value)))
        status, text = run("--params", "1e6", "--ranks", "16", "--plot", str(tmp_path / "plan.png"))
    assert status == 0, text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [value for _, value in axes] == [1e9, 16]
    found = methods(shapes_of_size(1_000_000), 150, replace(GIGABIT, ranks=16, carrier=CARRIERS["torch"]))
    for panel, value in axes:
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert list(lines) == [method.title for method in found.values()]
        assert {line.get_color() for line in lines.values()} == {STYLES[name].color for name in found}
        network = replace(GIGABIT, ranks=16, carrier=CARRIERS["torch"])
        x, y = lines["dense float32"].get_data()
        assert np.interp(value, x, y) == pytest.approx(found["dense"].seconds(network), rel=0.02)


def test_a_network_that_was_measured_has_no_bandwidth_to_compare_with(tmp_path: Path) -> None:
    shapes = shapes_of_size(25_000_000)
    measured = replace(GIGABIT, bytes_per_s=math.inf, latency_s=0.0)
    for nanoseconds in (NANOSECONDS, {**NANOSECONDS, "nominate": 0.0, "lowrank": 0.0}):
        made = Plan(shapes, measured, 150, 0.0, nanoseconds)
        assert "bandwidth" not in made.advice and "pays" not in made.advice and made.advice.endswith(".")
        assert made.as_record()["break_even_bits_per_s"] is None
    marked: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_figure, "_mark", lambda panel, value: marked.append(value))
        plan_figure.write_figure(tmp_path / "plan.png", shapes, measured, 150, NANOSECONDS)
    assert marked == [RANKS]


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, text = run("--params", "1e6", "--plot", str(tmp_path / "plan.png"))
    assert status == 2 and "pip install matplotlib" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--params"),
        (["--params", "1e6", "--plot", "plan.abacus"], "not supported"),
        (["--params", "1e6", "--model", "tests.unit.test_plan:model"], "one of"),
        (["--params", "-3"], "whole number"),
        (["--params", "1e6", "--bandwidth", "fast"], "100mbit"),
        (["--params", "1e6", "--latency", "5"], "50us"),
        (["--params", "1e6", "--launcher", "ssh"], "torch"),
        (["--params", "1e6", "--ratio", "0"], "--ratio"),
        (["--params", "1e6", "--ranks", "1"], "--ranks"),
        (["--model", "tests.unit.test_plan:nothing"], "package.module:function"),
        (["--params", "1e6", "--measure"], "torchrun"),
    ],
)
def test_bad_use_exits_with_2_and_says_what_is_expected(arguments: list[str], told: str) -> None:
    status, text = run(*arguments)
    assert status == 2 and told in " ".join(text.replace("│", " ").split()), text


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0.00 B"), (999.6e3, "1.00 MB"), (1.2345e9, "1.23 GB"), (12, "12.0 B")]
)
def test_three_digits(value: float, told: str) -> None:
    assert plan.told_bytes(value) == told
