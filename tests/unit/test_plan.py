"""``hvd-sketch plan``: its advice is what its own figures say; test_cost.py holds these against the ledger."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hvd_sketch import LowRankConfig, SketchConfig
from hvd_sketch.__main__ import app
from hvd_sketch.at_ratio import configurations
from hvd_sketch.commands import calibrate, plan_figure
from hvd_sketch.commands.calls import as_call
from hvd_sketch.commands.plan import Plan
from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.commands.styles import STYLES
from hvd_sketch.cost import BUCKET_BYTES, Network, Workload, faster_below, methods
from hvd_sketch.measured_costs import CARRIERS, CPU, H100, Work
from hvd_sketch.units import bits_per_s, told_bytes
from tests.support.harness import ROOT
from tests.unit.test_cost import GIGABIT, SHAPES

H100_KERNELS = ROOT / "benchmarks/results/gpu/h100/kernels.json"


def model() -> torch.nn.Module:
    """What a user's factory makes."""
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10))


def test_below_break_even_ours_is_faster_and_above_it_dense_is() -> None:
    found = methods(Workload(shapes_of_size(25_000_000), 50), GIGABIT)
    ours, dense = replace(found["nominate"], local_s=0.3), found["dense"]
    rate = faster_below(ours, GIGABIT, [dense])
    for factor, is_faster in ((0.9, True), (1.1, False)):
        there = replace(GIGABIT, bytes_per_s=factor * rate)
        assert (ours.seconds(there) < dense.seconds(there)) is is_faster
    assert faster_below(replace(ours, local_s=10.0, sent_bytes=dense.sent_bytes), GIGABIT, [dense]) == 0
    assert faster_below(replace(ours, local_s=0.0), GIGABIT, [replace(dense, local_s=1.0)]) == math.inf


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
    works = {**CPU, **{name: Work(each) for name, each in nanoseconds.items()}}
    made = Plan(Workload(shapes_of_size(25_000_000), 150, works), network)
    assert made.advice.startswith(told) and (" It pays " in made.advice) is (told != "Use PowerSGD")
    assert ("--measure" in made.advice) is (rate == "400gbit"), "as fast as this launcher has never been seen"
    assert bool(made.call) is told.startswith("Compress")


@pytest.mark.parametrize("backward_s", [0.0, 0.12])
def test_it_pays_where_it_is_advised(backward_s: float) -> None:
    workload = Workload(shapes_of_size(6_500_000), 150, CPU, backward_s=backward_s)
    rates = [bits_per_s(rate) / 8 for rate in ("100mbit", "1gbit", "5gbit", "20gbit")]
    plans = [Plan(workload, replace(GIGABIT, bytes_per_s=rate)) for rate in rates]
    limit = plans[0].as_record()["pays_below_bits_per_s"] / 8
    advised = [made.advice.startswith("Compress") for made in plans]
    assert advised == [rate < limit for rate in rates] and len(set(advised)) == 2


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.exit_code, done.output


def test_table_fits_80_columns_and_json_says_the_same() -> None:
    options = ["--params", "90e6", "--ranks", "16", "--bandwidth", "1gbit", "--latency", "50us", "--backward", "0.12s"]
    status, table = run(*options)
    *lines, call = table.splitlines()
    assert status == 0 and max(map(len, lines)) <= 80 and call.startswith("DistributedOptimizer(")
    status, text = run(*options, "--json")
    record = json.loads(text)
    assert status == 0 and record["coordinates"] == 90e6 and record["ranks"] == 16
    assert record["advice"].split(":")[0] in table
    dense = record["methods"]["dense"]
    assert dense["exchange_s"] == pytest.approx(8 * 90e6 * 15 / 16 / 125e6, rel=0.2)
    last_s = dense["exchange_s"] * BUCKET_BYTES / (4 * 90e6)
    assert dense["step_s"] == pytest.approx(max(0.12, dense["exchange_s"] - last_s) + last_s, rel=0.01)
    ours = record["methods"]["nominate"]
    assert ours["step_s"] == pytest.approx(ours["exchange_s"] + 0.12)
    dense = json.loads(run(*options, "--json", "--no-overlap")[1])["methods"]["dense"]
    assert dense["step_s"] == pytest.approx(dense["exchange_s"] + 0.12)


def test_a_users_model_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "LEAST_S", 0.02)
    status, text = run("--model", "tests.unit.test_plan:model", "--calibrate", "--ratio", "20", "--json")
    record = json.loads(text)
    assert status == 0 and record["coordinates"] == 300 * 200 + 200 * 10
    assert record["methods"].keys() == CPU.keys()
    for name, method in record["methods"].items():
        assert 0 < method["local_s"] < 1 and method["local_s"] != CPU[name].seconds(record["coordinates"])


def test_of_a_large_model_every_method_is_timed_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose fixed bytes, here of 1000 ranks, leave a small model no coordinate at the same ratio."""
    monkeypatch.setattr(calibrate, "LEAST_S", 0.0)
    monkeypatch.setitem(calibrate.LARGEST_TIMED, "cpu", 100_000)
    shapes, ratio, ranks = shapes_of_size(10**9), 1000, 1000
    timed = calibrate.works_here(shapes, ratio, ranks)
    assert timed.keys() == configurations(shapes, ratio, ranks).keys() | calibrate.OTHERS.keys()
    assert "nominate" not in configurations(shapes_of_size(100_000), ratio, ranks)


def test_local_work_of_others_does_what_they_do() -> None:
    random = torch.Generator().manual_seed(0)
    gradient = torch.outer(torch.rand(200, generator=random), torch.rand(300, generator=random)).flatten()
    made = {name: make(gradient, [(200, 300)])() for name, make in calibrate.OTHERS.items()}
    assert torch.equal(made["dense"], gradient), "the mean of two ranks with this gradient"
    assert torch.allclose(made["bf16"], gradient, rtol=1e-2)
    assert torch.allclose(made["powersgd"], gradient, atol=1e-4), "of one outer product nothing is left out"
    kept = made["topk"].nonzero().flatten()
    assert len(kept) == 60 and gradient[kept].min() >= gradient.sort().values[-60]


def test_a_figure_of_two_panels_has_every_method(tmp_path: Path) -> None:
    axes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_figure, "_mark", lambda panel, value: axes.append((panel, value)))
        status, text = run("--params", "1e6", "--ranks", "16", "--plot", str(tmp_path / "plan.png"))
    assert status == 0, text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [value for _, value in axes] == [1e9, 16]
    found = methods(Workload(shapes_of_size(1_000_000), 150), replace(GIGABIT, ranks=16, carrier=CARRIERS["torch"]))
    for panel, value in axes:
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert list(lines) == [method.title for method in found.values()]
        assert {line.get_color() for line in lines.values()} == {STYLES[name].color for name in found}
        network = replace(GIGABIT, ranks=16, carrier=CARRIERS["torch"])
        x, y = lines["dense float32"].get_data()
        assert np.interp(value, x, y) == pytest.approx(found["dense"].seconds(network), rel=0.02)


def test_a_message_to_every_rank_costs_ours_as_many_and_a_library_has_rings_and_trees() -> None:
    workload = Workload(shapes_of_size(25_000_000), 150)

    def waited_s(name: str, ranks: int, carrier: str) -> float:
        network = Network(ranks, math.inf, 1e-3, replace(CARRIERS[carrier], bytes_per_s=math.inf, wake_s=0.0))
        return methods(workload, network)[name].network_s(network)

    thread_s = CARRIERS["horovod-own"].collective_s
    assert waited_s("nominate", 2, "horovod-own") - waited_s("nominate", 2, "mpi") == pytest.approx(3 * thread_s)
    ours, torch_s = CARRIERS["mpi"].message_s, CARRIERS["torch"].message_s
    assert waited_s("nominate", 31, "mpi") == pytest.approx(3 * (30 * ours + 1e-3))
    assert waited_s("nominate", 1024, "mpi") == pytest.approx(3 * (62 * ours + 2e-3)), "rows, then columns of 32"
    assert waited_s("dense", 1024, "mpi") == pytest.approx(20 * (ours + 1e-3)), "a tree there and back"
    assert waited_s("dense", 1024, "torch") == pytest.approx(2046 * (torch_s + 1e-3)), "Gloo has a ring"


def test_of_link_and_transport_the_slower_one_counts() -> None:
    network = Network(2, 1e9, 0.0, replace(CARRIERS["mpi"], message_s=0.0, bytes_per_s=2e9))
    dense = methods(Workload(SHAPES, 50), network)["dense"]
    for rate, counts in ((1e9, 1e9), (1e12, 2e9)):
        assert dense.network_s(replace(network, bytes_per_s=rate)) == pytest.approx(dense.sent_bytes / counts)


def test_levels_take_the_mean_of_a_host_first_and_local_steps_exchange_seldom() -> None:
    options = ["--params", "25e6", "--ranks", "16", "--bandwidth", "100mbit", "--json"]
    flat, levels, seldom = (
        json.loads(run(*options, *more)[1]) for more in ([], ["--per-host", "4"], ["--every", "16"])
    )
    assert (levels["ranks"], levels["hosts"], flat["hosts"]) == (16, 4, 16)
    inside_s = (2 * 3 / 4 + 1) * 4 * 25e6 / CARRIERS["torch"].bytes_per_s
    between = Network(4, 100e6 / 8, 50e-6, CARRIERS["torch"])
    alone = methods(Workload(shapes_of_size(25_000_000), 150), between)["nominate"]
    assert levels["methods"]["nominate"]["exchange_s"] == pytest.approx(alone.seconds(between) + inside_s, rel=0.05)
    assert levels["call"].endswith(", levels=2)") and seldom["call"].endswith(", every=16)")
    ours, dense = seldom["methods"]["nominate"], seldom["methods"]["dense"]
    assert ours["step_s"] == pytest.approx(ours["exchange_s"] / 16)
    assert ours["local_s"] > flat["methods"]["nominate"]["local_s"], "where a round began is kept, and gone back to"
    assert dense["step_s"] == pytest.approx(dense["exchange_s"])
    assert ours["kept_bytes"] == flat["methods"]["nominate"]["kept_bytes"] + 8 * 25e6


@pytest.mark.parametrize("options", [["--params", "25e6"], ["--params", "25e6", "--bits", "8"]])
def test_the_line_to_copy_makes_what_is_planned(options: list[str]) -> None:
    status, table = run(*options, "--bandwidth", "10mbit")
    record = json.loads(run(*options, "--bandwidth", "10mbit", "--json")[1])
    made = next(line for line in table.splitlines() if line.startswith("DistributedOptimizer("))
    assert status == 0 and made == record["call"]
    names = {"LowRankConfig": LowRankConfig, "SketchConfig": SketchConfig}
    own = eval(made.partition("compression=")[2].removesuffix(")"), names)
    planned = methods(Workload(shapes_of_size(25_000_000), record["ratio"], bits=own.value_bits), GIGABIT)
    assert own == planned[record["advised"]].config
    for name, method in planned.items():
        if method.config is not None:
            assert eval(as_call(method.config), names) == method.config
            assert record["methods"][name]["config"]["value_bits"] == method.config.value_bits


def test_an_h100_has_the_steps_of_its_record_and_those_methods_alone() -> None:
    status, text = run("--params", "100e6", "--device", "cuda", "--launcher", "mpi", "--json")
    record = json.loads(text)
    assert status == 0 and record["methods"].keys() == H100.keys() and record["advised"] == "nominate"
    for setting in json.loads(H100_KERNELS.read_text())["settings"]:
        for name, operation in (("nominate", "nominated step"), ("paper", "step")):
            timed_s = 1e-3 * median(setting["elapsed_ms"][operation])
            assert H100[name].seconds(setting["dim"]) == pytest.approx(timed_s, rel=0.21)


def test_a_ratio_that_low_rank_cannot_reach_is_marked() -> None:
    status, table = run("--params", "1e6", "--ratio", "5000")
    record = json.loads(run("--params", "1e6", "--ratio", "5000", "--json")[1])["methods"]
    reached = record["lowrank"]["ratio"]
    assert status == 0 and reached < 4000 and f"low rank, 4 bit, {reached:.0f}x" in table
    assert record["nominate"]["ratio"] == pytest.approx(5000, rel=0.05) and "nominated, 4 bit " in table
    assert max(map(len, table.splitlines()[:-1])) <= 80


def test_a_size_is_met_whatever_it_is() -> None:
    for dim in (1, 999, 1000, 1001, 2_345_678, 10**12 + 1):
        shapes = shapes_of_size(dim)
        assert sum(map(prod, shapes)) == dim and len(shapes) <= 1002


def test_a_figure_of_two_levels_counts_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    monkeypatch.setattr(plan_figure, "_mark", lambda panel, value: panels.append((panel, value)))
    status, text = run("--params", "1e6", "--ranks", "16", "--per-host", "4", "--plot", str(tmp_path / "plan.svg"))
    (by_rate, _), (by_ranks, hosts) = panels
    assert status == 0 and hosts == 4, text
    assert by_rate.get_title() == "4 hosts of 4 ranks" and by_ranks.get_xlabel() == "hosts of 4 ranks"


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, text = run("--params", "1e6", "--plot", str(tmp_path / "plan.png"))
    assert status == 2 and "hvd_sketch[plot]" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--params"),
        (["--params", "1e6", "--plot", "plan.abacus"], "one of the suffixes ."),
        (["--params", "1e6", "--plot", "plan"], "one of the suffixes ."),
        (["--params", "1e6", "--plot", "."], "a folder; expected a file to write"),
        (["--params", "1e6", "--model", "tests.unit.test_plan:model"], "one of"),
        (["--params", "-3"], "whole number"),
        (["--params", "1e6", "--bandwidth", "fast"], "100mbit"),
        (["--params", "1e6", "--latency", "5"], "50us"),
        (["--params", "1e6", "--launcher", "ssh"], "torch"),
        (["--params", "1e6", "--ratio", "0"], "--ratio"),
        (["--params", "1e6", "--ranks", "1"], "--ranks"),
        (["--model", "tests.unit.test_plan:nothing"], "package.module:function"),
        (["--model", "tests.unit.test_plan:run"], "a function of no arguments that returns an nn.Module"),
        (["--params", "1e6", "--measure"], "torchrun"),
        (["--params", "1e6", "--measure", "--ranks", "8", "--launcher", "mpi"], "--ranks, --launcher"),
        (["--params", "1e6", "--per-host", "3"], "two hosts of --per-host 3"),
        (["--params", "1e6", "--ranks", "8", "--per-host", "2", "--every", "2"], "--every"),
        (["--params", "1e6", "--bits", "5"], "--bits"),
        (["--params", "1e6", "--ratio", "0", "--calibrate"], "--ratio must be positive"),
        (["--params", "1e6", "--device", "tpu"], "--device"),
        (["--params", "1e6", "--device", "cuda", "--calibrate"], "torch sees no GPU"),
        (["--params", "1e6", "--device", "cuda", "--measure"], "torch sees no GPU"),
        (["--params", "1e3", "--ratio", "1e6", "--device", "cuda"], "--ratio"),
    ],
)
def test_bad_use_exits_with_2_and_says_what_is_expected(arguments: list[str], told: str) -> None:
    status, text = run(*arguments)
    assert status == 2 and told in " ".join(text.replace("│", " ").split()), text


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0.00 B"), (999.6e3, "1.00 MB"), (1.2345e9, "1.23 GB"), (12, "12.0 B")]
)
def test_three_digits(value: float, told: str) -> None:
    assert told_bytes(value) == told


def test_advice_suits_the_optimizer() -> None:
    """Nominations into AdamW train badly, and the warning of DistributedOptimizer says so."""
    options = ["--params", "25e6", "--ranks", "8", "--bandwidth", "1gbit", "--no-overlap"]
    ours = (("sgd", "nominate", 150), ("adamw", "lowrank", 60), ("lagadamw", "nominate", 60), ("signsgd", "random", 60))
    for optimizer, name, ratio in ours:
        record = json.loads(run(*options, "--optimizer", optimizer, "--json")[1])
        assert record["advised"] in (name, "powersgd") and record["ratio"] == ratio
        assert ("residual_decay=0.95" in (record["call"] or "")) == (optimizer == "signsgd")
    assert json.loads(run(*options, "--optimizer", "adamw", "--every", "16", "--json")[1])["advised"] == "nominate"
    for refused in (["--optimizer", "rmsprop"], ["--optimizer", "signsgd", "--device", "cuda"]):
        status, text = run(*options, *refused)
        assert status == 2 and "--optimizer" in text
