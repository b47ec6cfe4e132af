"""A method has one colour in every figure, and no two methods of a figure look alike."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy_per_byte import by_ranks
from benchmarks.figures import styles_of
from benchmarks.network import bandwidth_report
from hvd_sketch.commands.styles import STYLES


@pytest.mark.parametrize("lines", [by_ranks.LINES, bandwidth_report.LINES])
def test_lines_of_a_figure_differ(lines: dict[str, dict[str, Any]]) -> None:
    seen = [(line["color"], line["marker"], line.get("markerfacecolor")) for line in lines.values()]
    assert len(set(seen)) == len(seen)


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
