"""A method has one colour in every figure, and no two methods of a figure look alike."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import quickstart
from benchmarks.accuracy_per_byte import by_ranks
from benchmarks.figures import styles_of
from benchmarks.network import bandwidth_figures, bandwidth_report
from benchmarks.paper import ablations_figure, cifar10_figure, translation_figure
from hvd_sketch.commands.styles import STYLES

ROOT = Path(__file__).parents[2]
FIGURES = [by_ranks, bandwidth_report, ablations_figure, cifar10_figure, translation_figure, quickstart]


@pytest.mark.parametrize("figure", FIGURES)
def test_lines_of_a_figure_differ(figure: ModuleType) -> None:
    seen = [(line["color"], line["marker"], line.get("markerfacecolor")) for line in figure.LINES.values()]
    assert len(set(seen)) == len(seen)


def test_figures_of_the_network_are_of_bandwidths_and_of_hosts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [
        {
            "method": method,
            "transport": "mpi",
            "dim": dim,
            "hosts": hosts,
            "rate": rate,
            "seconds": {"median": hosts / at},
        }
        for dim, every in ((1_000_000, (2, 4, 8)), (6_500_000, (2, 4)))
        for hosts in every
        for at, rate in enumerate(("100mbit", "1gbit", "none"), start=1)
        for method in ("allreduce", "nominate150")
    ]
    paths = bandwidth_figures.plot(records, tmp_path / "bandwidth.png")
    assert [path.name for path in paths] == ["bandwidth-1M.png", "bandwidth-1M-hosts.png", "bandwidth-6.5M.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_lines_without_markers_differ() -> None:
    seen = [(line["color"], line["linestyle"]) for line in translation_figure.LINES.values()]
    assert len(set(seen)) == len(seen)


def test_no_figure_has_colours_of_its_own() -> None:
    sources = [path for folder in ("benchmarks", "hvd_sketch") for path in (ROOT / folder).rglob("*.py")]
    coloured = re.compile(r"""["'](tab:\w+|C\d|#[0-9A-Fa-f]{6})["']""")
    own = {path.name for path in sources if coloured.search(path.read_text())}
    assert own == {"styles.py", "figures.py", "charts.py"}  # the last has colours of runs, for reports


@pytest.mark.parametrize(
    ("method", "of_network", "kind"),
    [("lowrank4", "lowrank150", "lowrank"), ("local8", "topk", "topk"), ("paper", "sketch20", "paper")],
)
def test_a_method_has_one_colour_in_all_figures(method: str, of_network: str, kind: str) -> None:
    lines = by_ranks.LINES[method], bandwidth_report.LINES[of_network]
    assert {line["color"] for line in lines} == {STYLES[kind].color}


def test_the_first_of_a_kind_looks_as_in_the_plan() -> None:
    styles = styles_of({"a": "lowrank", "b": "lowrank", "c": "of others"})
    assert styles["a"] == STYLES["lowrank"].options()
    assert styles["b"]["color"] == styles["a"]["color"] and styles["b"]["markerfacecolor"] == "white"
