"""What ``hvd-sketch report`` makes of logs: which belong together, what is left out, new starts, large numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from hvd_sketch.report.runs import read_run
from hvd_sketch.report.tables import summary
from tests.support.logged import write_long_run
from tests.unit.test_report import report


@pytest.mark.parametrize("content", ["", "no log", '{"run":1,"size":2}\n{"step":"x"}\n', None])
def test_a_log_of_another_rank_that_cannot_be_read_is_left_out(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "run.jsonl", tmp_path / "run.rank1.jsonl"
    write_long_run(path, 20, 2)
    other.unlink()
    if content is None:
        other.mkdir()
    else:
        other.write_text(content)
    run = read_run(path, "run")
    assert run.ranks == [0] and not run.has_all_ranks and "a log of another rank is left out: " in caplog.text
    assert "run.rank1.jsonl" in caplog.text


def test_a_log_of_a_rank_that_the_run_has_not_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 20, 2)
    (tmp_path / "run.rank5.jsonl").write_text("")
    assert read_run(path, "run").has_all_ranks and not caplog.text


def test_logs_of_other_ranks_are_no_runs_of_their_own(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_long_run(tmp_path / name, 20, 2)
    page = tmp_path / "report.html"
    status, text = report(*sorted(tmp_path.glob("*.jsonl"), reverse=True), "--output", page)
    assert status == 0 and "report.html: b, a, 40 steps" in text, text
    (tmp_path / "a.jsonl").unlink()
    status, text = report(tmp_path / "a.rank1.jsonl", "--output", page)
    assert status == 2 and "is the log of rank 1: give that of rank 0" in text, text


def test_the_log_that_was_kept_is_found_with_its_other_ranks(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 20, 3)
    for log in tmp_path.glob("run*"):
        log.rename(log.with_name(log.name + ".old"))
    write_long_run(path, 10, 2)
    assert read_run(path, "run").ranks == [0, 1]
    kept = read_run(path.with_name("run.jsonl.old"), "kept")
    assert kept.ranks == [0, 1, 2] and kept.steps.sum() == 20


def test_large_values_have_a_mean(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 400, 2)
    for log in tmp_path.glob("run*"):
        log.write_text(re.sub(r'"loss":[0-9.]+', '"loss":1.79769e308', log.read_text()))
    status, text = report(path, "--output", tmp_path / "report.html")
    assert status == 0, text
    told = {name: texts[0] for name, texts in summary([read_run(path, "run")]).rows}
    assert told["loss, last"] == "1.8e+308"


def test_a_run_without_time_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 5, 1)
    path.write_text(re.sub(r'"step_s":[0-9.]+', '"step_s":0.0', path.read_text()))
    told = {name: texts[0] for name, texts in summary([read_run(path, "run")]).rows}
    assert told["of a step: compression"] == "–"


def test_a_new_start_inside_of_a_line_leaves_its_steps_before(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_long_run(path, 20, 2)
    for log in tmp_path.glob("run*"):
        first, *lines = log.read_text().splitlines()
        line = json.loads(lines[7])
        sums = {name: 8 * line[name] for name in ("steps", "step_s", "exchange_s", "dense_bytes")}
        sums["phases"] = {phase: [8 * each for each in pair] for phase, pair in line["phases"].items()}
        log.write_text("\n".join([first, json.dumps({**line, **sums}), *lines[6:]]))  # begins again with step 6
    run = read_run(path, "run")
    assert run.step.tolist() == [5, *range(6, 20)] and run.steps.tolist() == [6] + [1] * 14
    assert run.sent_so_far.tolist() == [15000 * at for at in range(6, 21)] and run.in_all_logs.all()
    assert run.dense_bytes.sum() == 20 * 6_000_000 and (np.diff(run.time_s) > 0).all()
