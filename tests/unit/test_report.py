"""The page of ``hvd-sketch report``: what it says, how it looks in a browser, what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hvd_sketch.__main__ import app
from hvd_sketch.report.charts import Chart, charts, running_mean
from hvd_sketch.report.decimate import ends, peaks, sums
from hvd_sketch.report.runs import Run, read_run
from hvd_sketch.report.tables import summary
from tests.support.browser import CHROMIUM, look_at, take_pictures
from tests.support.logged import SLOW_RANK, write_long_run

STEPS, RANKS = 10_000, 4
MOST_BYTES = 8e6
pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of 10,000 steps on four ranks."""
    path = tmp_path_factory.mktemp("report") / "long.jsonl"
    write_long_run(path, STEPS, RANKS)
    return path


@pytest.fixture(scope="module")
def run(log: Path) -> Run:
    return read_run(log, "long")


@pytest.fixture(scope="module")
def page(log: Path) -> Path:
    """Of that run beside a short one."""
    short = log.with_name("short.jsonl")
    write_long_run(short, 20, 2)
    status, text = report(log, short, "--output", str(log.with_name("report.html")))
    assert status == 0 and "report.html: long, short, 10,020 steps" in text.replace("\n", ""), text
    return log.with_name("report.html")


def report(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, re.sub(r"[│\s]+", " ", done.output)


def chart(found: list[Chart], title: str) -> Chart:
    return next(each for each in found if each.title == title)


# --- what it says


def test_no_peak_is_hidden_and_no_chart_has_many_points(run: Run) -> None:
    found = charts([run])
    longest = chart(found, "Longest and shortest steps").data[0]
    assert max(longest["y"]) == pytest.approx(run.longest_s.max(), rel=1e-4) and max(longest["y"]) > 2
    assert longest["x"][int(np.argmax(longest["y"]))] == STEPS // 3
    assert all(len(trace["x"]) <= 1000 for each in found for trace in each.data)


def test_the_numbers_are_those_of_the_log(run: Run) -> None:
    told = {name: texts[0] for name, texts in summary([run]).rows}
    assert told["bytes of a step, sent"] == "15.0 kB" and told["times fewer bytes"] == "400.0"
    assert told["bytes sent by a rank"] == told["bytes received by a rank"] == "150 MB"
    assert told["skipped steps"] == "10" and told["steps"] == "10000" and told["ranks"] == "4"
    found = charts([run])
    cumulative, dense = chart(found, "Bytes sent and received").data
    assert (cumulative["y"][-1], dense["y"][-1]) == (1.5e8, 6e10)
    phases = {trace["name"]: trace["y"][0] for trace in chart(found, "Bytes of a step, by phase").data}
    assert phases["back"] == 5000 and phases["single steps"] == 15000
    waiting = chart(found, "Time of a step, by rank").data[-1]
    assert waiting["name"] == "waiting for the slowest"
    assert waiting["x"] == pytest.approx([0 if rank == SLOW_RANK else 0.004 for rank in range(RANKS)])
    assert chart(found, "loss over bytes").data and chart(found, "accuracy over time").data


def test_a_program_gets_the_same_numbers(log: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(log), "--output", str(page), "--json"])
    written = json.loads(done.output)
    assert (written["page"], written["page_bytes"]) == (str(page), page.stat().st_size)
    [told] = written["runs"]
    assert (told["name"], told["ranks"], told["steps"], told["skipped_steps"]) == ("long", RANKS, STEPS, 10)
    assert (told["sent_bytes"], told["dense_bytes"], told["ratio"]) == (150_000_000, 60_000_000_000, 400.0)
    assert sum(told["shares_of_a_step"].values()) == pytest.approx(1, abs=1e-4)
    assert told["last_values"].keys() == {"loss", "accuracy"}


def test_without_the_other_ranks_waiting_is_not_told_from_the_network(log: Path, tmp_path: Path) -> None:
    alone = tmp_path / "long.jsonl"
    alone.write_bytes(log.read_bytes())
    run = read_run(alone, "alone")
    assert "network and waiting" in run.parts_s and "network" not in run.parts_s
    assert "1 of 4 ranks were found" in chart(charts([run]), "Time of a step").about


def test_steps_that_some_rank_has_not_written_are_told_not_left_out(tmp_path: Path) -> None:
    path, other = tmp_path / "run.jsonl", tmp_path / "run.rank1.jsonl"
    write_long_run(path, 20, 2)
    lines = other.read_text().splitlines(keepends=True)
    other.write_text("".join(lines[:6] + lines[16:]))  # as where its disk was full for 10 steps
    run = read_run(path, "run")
    told = {name: texts[0] for name, texts in summary([run]).rows}
    assert told["steps"] == "20, 10 of them in the logs of all ranks"
    assert run.sent_so_far[-1] == 20 * 15000 and run.has_all_ranks
    text = json.dumps([each.data for each in charts([run])])
    assert "NaN" not in text and "nan" not in "".join(told.values())
    waiting = chart(charts([run]), "Time of a step, by rank").data[-1]
    assert waiting["x"][1] == pytest.approx(0, abs=1e-9)  # the slow rank's, over the steps that it has
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    told = {name: texts[0] for name, texts in summary([read_run(path, "run")]).rows}
    assert told["steps"] == "17, 7 of them in the logs of all ranks"
    other.write_text("".join(lines))
    told = {name: texts[0] for name, texts in summary([read_run(path, "run")]).rows}
    assert told["steps"] == "17; rank 0's log lacks 3 more"


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"started": 1000.0}, "differs in started"), ({"compression": None}, "differs in compression")],
)
def test_the_log_of_a_run_before_is_left_out(
    changed: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "run.jsonl", tmp_path / "run.rank1.jsonl"
    write_long_run(path, 20, 2)
    first, rest = other.read_text().split("\n", 1)
    other.write_text(json.dumps({**json.loads(first), **changed}) + "\n" + rest)
    run = read_run(path, "run")
    assert run.ranks == [0] and not run.has_all_ranks
    assert (
        f"run.rank1.jsonl is left out: it is of another run than rank 0's log, whose first line {told}" in caplog.text
    )


def test_one_large_number_does_not_change_the_mean_of_later_ones() -> None:
    y = np.ones(100_000)
    y[1000] = 1e300
    mean = running_mean(y, 2000)
    assert mean[:1000] == pytest.approx(1) and mean[-90_000:] == pytest.approx(1)
    assert running_mean(np.full(400, 1.79769e308), 8) == pytest.approx(np.full(400, 1.79769e308))


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=400), st.integers(1, 20))
def test_peaks_and_sums_keep_what_matters(values: list[float], buckets: int) -> None:
    y = np.array(values)
    at = peaks(y, buckets)
    assert at[0] == 0 and at[-1] == len(y) - 1 and (np.diff(at) > 0).all() and len(at) <= 4 * buckets + 2
    assert y[at].max() == y.max() and y[at].min() == y.min()
    assert sums(y, buckets).sum() == pytest.approx(y.sum(), abs=1e-3) and ends(len(y), buckets)[-1] == len(y) - 1
    widths = [min(max(end // 10, 1), 30) for end in range(1, len(y) + 1)]
    expected = [y[end - width : end].mean() for end, width in enumerate(widths, start=1)]
    assert running_mean(y, 30) == pytest.approx(expected, abs=1e-3)


# --- how it looks


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("is_dark", [False, True])
def test_nothing_is_cut_off_at_any_width(page: Path, tmp_path: Path, is_dark: bool) -> None:
    for seen in look_at(page, tmp_path, (400, 1400), is_dark):
        assert not seen["too_wide"] and not seen["cut_off"] and not seen["overlapping"], seen
        assert len(seen["charts"]) == 15 and all(seen["charts"]) and seen["texts"] > 100, "all charts are drawn"
        page_is, ink_is = [np.mean([int(part) for part in re.findall(r"\d+", seen[what])]) for what in ("page", "ink")]
        assert (page_is < 60 and ink_is > 200) if is_dark else (page_is > 200 and ink_is < 80), seen
        assert not seen["loaded"], "it needs no other file"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pictures_are_of_the_page(page: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    taken = take_pictures(page, tmp_path, [400])
    assert [path.name for path in taken] == ["report-400-light.png", "report-400-dark.png"]
    light, dark = (image.imread(path)[..., :3] for path in taken)
    assert light.shape == dark.shape and light.shape[1] == 400
    assert light.mean() > 0.8 and dark.mean() < 0.3 and min(light.std(), dark.std()) > 0.05, "and not of an empty one"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_long_run_opens_almost_as_fast_as_a_short_one(log: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert report(log, "--output", page)[0] == 0
    assert page.stat().st_size < MOST_BYTES
    short = tmp_path / "short.jsonl"
    write_long_run(short, 20, RANKS)
    assert report(short, "--output", tmp_path / "short.html")[0] == 0
    # In turns, the best of each: other programs slow both. As a ratio: what a second draws depends on the machine.
    opened_ms: dict[str, list[float]] = {"report.html": [], "short.html": []}
    for _ in range(3):
        for name, of_page in opened_ms.items():
            of_page.append(look_at(tmp_path / name, tmp_path, [1400], False)[0]["drawn_ms"])
    assert min(opened_ms["report.html"]) < 2 * min(opened_ms["short.html"]), opened_ms


def test_names_cannot_break_out_of_the_page(log: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<script>alert(1)<script>.jsonl"
    write_long_run(odd, 3, 1)
    assert report(odd, "--output", tmp_path / "report.html")[0] == 0
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


# --- what is refused


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    for text, told in (
        ("", "is empty: expected a file that"),
        ('{"loss": 1}\nnot json\n3\n[]\n', "is no log of this version"),
        (json.dumps({"run": 99, "size": 1}) + "\n", "of format 1, found 99"),
        (json.dumps({"run": 1, "size": 1}) + "\n", "has no step"),
    ):
        path = tmp_path / "run.jsonl"
        path.write_text(text)
        status, output = report(path, "--output", tmp_path / "report.html")
        assert status == 2 and told in output, output
    assert not (tmp_path / "report.html").exists()
    assert report(tmp_path / "nowhere.jsonl")[0] == 2


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("steps", "phases", "values", "time_s")),
        {"step": "x"},
        {"steps": 0},
        {"step_s": float("nan")},
        {"phases": {"left": [1]}},
        {"values": [1]},
        {"values": {"loss": "abc"}},
        {"captured": "much"},
        {"time_s": 10**400},
        {"step_s": 1e308},
        {"phases": {"left": [1e308, 0]}},
    ],
)
def test_a_line_that_nobody_wrote_is_refused_with_its_file(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 5, 1)
    lines = path.read_text().splitlines()
    changed = {name: value for name, value in {**json.loads(lines[3]), **change}.items() if value is not None}
    path.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]))
    status, output = report(path, "--output", tmp_path / "report.html")
    assert status == 2 and "has a line that" in output and "run.jsonl" in output, output


def test_a_start_that_nobody_wrote_is_refused_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 5, 2)
    for started in (None, "today", [1], 10**400):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "started": started}), *lines[1:]]))
        status, output = report(path, "--output", tmp_path / "report.html")
        assert status == 2 and "has a line that" in output and "run.jsonl" in output, output


def test_a_log_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 5, 2)
    for output in (path, tmp_path / "run.rank1.jsonl", tmp_path / "." / "run.jsonl"):
        before = output.read_bytes()
        status, told = report(path, "--output", output)
        assert status == 2 and "would replace it" in told and output.read_bytes() == before


def test_a_missing_library_is_named(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    status, output = report(log)
    assert status == 2 and "pip install 'hvd_sketch[report]'" in output
