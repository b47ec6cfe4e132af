"""What one rank writes about its steps: whole lines, whatever happens, and never in the way of the training."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from benchmarks import logging_cost
from hvd_sketch import logs
from hvd_sketch.__main__ import app
from hvd_sketch.commands.merge_traces import merge_traces
from hvd_sketch.logs import step_observer
from hvd_sketch.logs.line_file import LineFile
from hvd_sketch.logs.run_log import SINGLE_STEPS, steps_of_line
from hvd_sketch.logs.step_observer import Output, StepObserver
from hvd_sketch.report.runs import read_run
from tests.support.logged import EVERY, lines_of, local_steps, wrapped
from tests.support.saving import full_disk
from tests.support.toy import alone

MANY = 20_000  # values


def test_residual_and_captured_energy_are_those_of_the_exchange(tmp_path: Path) -> None:
    model, optimizer = wrapped(alone(), log=tmp_path / "run.jsonl")
    time.sleep(0.1)  # set-up is no part of the first step
    model.backward(0, 0)
    gradient = torch.cat([model.weight.grad.flatten(), model.other.grad.flatten()])  # type: ignore[union-attr]
    optimizer.step()
    residual = optimizer.exchange.residual.clone()  # type: ignore[union-attr]
    optimizer.close_logs()
    step = lines_of(tmp_path / "run.jsonl")[1]
    assert step["residual_norm"] == pytest.approx(float(residual.norm()), rel=1e-4)
    assert step["step_s"] == pytest.approx(step["exchange_s"], abs=0.05)
    assert step["captured"] == pytest.approx(1 - float(residual.norm() / gradient.norm()) ** 2, rel=1e-4)


def test_torch_profiler_shows_the_phases() -> None:
    model, optimizer = wrapped(alone())
    model.backward(0, 0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    names = {event.key for event in profiled.key_averages()}
    assert {"hvd_sketch exchange", "hvd_sketch agree", "hvd_sketch sketch", "hvd_sketch allreduce"} <= names


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = wrapped(alone())
    model.backward(0, 0)
    optimizer.log_values(loss=1.0)
    optimizer.step()
    assert not list(tmp_path.iterdir())


# As Horovod 0.28 begins and, where it is ended, leaves a timeline.
TIMELINE = """[
{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros":%d}},
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allgather.hvd_sketch.0.allgather"}},
{"ph": "B", "name": "ALLGATHER", "ts": 1000, "pid": 1},
{"ph": "E", "ts": 2000, "pid": 1},
{"ph": "B", "name": "ALLGA"""


def test_traces_of_ranks_torch_and_horovod_fit_together(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("trace.json", "torch.json", "timeline.json")]
    model, optimizer = wrapped(alone(), trace=files[0])
    model.backward(0, 0)
    start_us = time.time_ns() // 1000
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    end_us = time.time_ns() // 1000
    optimizer.close_logs()
    profiled.export_chrome_trace(str(files[1]))
    files[2].write_text(TIMELINE % start_us)
    arguments = ["merge-traces", *map(str, files), "--output", str(tmp_path / "merged.json"), "--json"]
    written = json.loads(CliRunner().invoke(app, arguments).output)
    events = json.loads((tmp_path / "merged.json").read_text())["traceEvents"]
    processes = {event["pid"] for event in events}
    assert written == {"trace": arguments[5], "events": len(events), "processes": len(processes)}
    ours, theirs = [next(e for e in events if e.get("name") == name) for name in ("exchange", "hvd_sketch exchange")]
    slack_us = 10_000
    assert abs(ours["ts"] - theirs["ts"]) < slack_us and abs(ours["dur"] - theirs["dur"]) < slack_us
    assert len({event["pid"] for event in events if event.get("name") in ("exchange", "hvd_sketch exchange")}) == 2
    gathered = next(event for event in events if event.get("name") == "ALLGATHER")
    assert gathered["ts"] - 1000 - slack_us < ours["ts"] < gathered["ts"] - 1000 + end_us - start_us + slack_us
    assert [event["ph"] for event in events if event["pid"] == gathered["pid"]] == ["M", "B", "E"]
    files[0].write_text("no trace")
    with pytest.raises(ValueError, match=r"trace\.json is no trace"):
        merge_traces(files, tmp_path / "merged.json")


def test_a_run_that_goes_on_adds_to_its_log_and_a_new_one_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    state: dict[str, Any] = {}
    for start, stop in ((0, 6), (4, 9)):  # the second from a checkpoint of step 4
        model, optimizer = wrapped(alone(), log=path)
        if state:
            optimizer.load_state_dict(state)
        for step in range(start, stop):
            if step == 4:
                state = optimizer.state_dict()
            optimizer.zero_grad()
            model.backward(0, step)
            optimizer.log_values(part=start)
            optimizer.step()
        optimizer.close_logs()
    run = read_run(path, "run")
    assert run.step.tolist() == list(range(9)) and run.values["part"].values.tolist() == [0] * 4 + [4] * 5
    assert (run.time_s[1:] > run.time_s[:-1]).all()
    model, optimizer = wrapped(alone(), log=path)
    model.backward(0, 0)
    optimizer.step()
    optimizer.close_logs()
    assert read_run(path, "run").step.tolist() == [0]
    assert len(lines_of(path.with_name("run.jsonl.old"))) == 2 + 6 + 5


def test_a_rank_outside_of_its_process_set_writes_nothing(tmp_path: Path) -> None:
    class Others:
        def included(self) -> bool:
            return False

    model, optimizer = wrapped("auto", process_set=Others(), log=tmp_path / "run.jsonl", trace=tmp_path / "trace.json")
    model.backward(0, 0)
    optimizer.step()
    optimizer.close_logs()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_logged", [False, True])
def test_what_is_no_number_is_refused_at_once(tmp_path: Path, is_logged: bool) -> None:
    model, optimizer = wrapped(alone(), log=tmp_path / "run.jsonl" if is_logged else None)
    for value in (torch.ones(2), torch.zeros(0), [1.0], None, "1.0", 1j, torch.tensor(1j), np.ones(2)):
        with pytest.raises(TypeError, match="rank 0 cannot log 'odd': expected a number or a tensor of one element"):
            optimizer.log_values(odd=value)
    optimizer.log_values(fine=torch.ones(1, 1, requires_grad=True))
    optimizer.log_values(fine=np.float32(2))
    optimizer.log_values(fine=True)
    model.backward(0, 0)
    optimizer.step()
    optimizer.close_logs()
    assert not is_logged or lines_of(tmp_path / "run.jsonl")[1]["values"] == {"fine": pytest.approx(4 / 3, abs=1e-5)}


class Broken(Output):
    def write(self, steps: Any) -> None:
        raise KeyError("broken")

    def close(self, last: Any) -> None:
        raise KeyError("broken")


def test_a_log_that_breaks_is_told_once_and_stops_no_training(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = wrapped(alone())
    optimizer.ledger.observer = observer = StepObserver(optimizer.ledger, optimizer.exchange, [Broken()])
    for step in range(3):
        optimizer.zero_grad()
        model.backward(0, step)
        optimizer.step()
        observer.flush()
    optimizer.close_logs()
    assert len(caplog.records) == 1 and "steps are missing in the logs (KeyError: 'broken')" in caplog.text


def test_values_without_steps_take_no_memory(tmp_path: Path) -> None:
    _, optimizer = wrapped(alone(), log=tmp_path / "run.jsonl")
    optimizer.log_values(loss=0.5)
    tracemalloc.start()
    for number in range(MANY):
        optimizer.log_values(loss=number + 0.5)
    taken = tracemalloc.take_snapshot()
    tracemalloc.stop()
    # Of the logs alone: the threads that run other tests' jobs allocate meanwhile. Python keeps up to 2,000 tuples of
    # 56 bytes to use them again, and those count, too: a value that is kept takes 24 bytes, which is more in all.
    of_logs = taken.filter_traces([tracemalloc.Filter(True, f"{Path(logs.__file__).parent}/*")])
    assert sum(trace.size for trace in of_logs.traces) < 12 * MANY


def test_a_fork_leaves_the_files_to_its_parent(tmp_path: Path) -> None:
    model, optimizer = wrapped(alone(), log=tmp_path / "run.jsonl")
    model.backward(0, 0)
    optimizer.step()
    child = os.fork()
    if child == 0:
        optimizer.close_logs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and not list(tmp_path.iterdir())
    optimizer.close_logs()
    assert [line["step"] for line in lines_of(tmp_path / "run.jsonl")[1:]] == [0]


def test_a_full_disk_is_told_once_and_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    file = LineFile(path)
    file.write(["first"])
    with full_disk(1000), caplog.at_level(logging.ERROR):
        for number in range(100):
            file.write([f"{number:99d}"])
    assert len(caplog.records) == 1 and "run.jsonl was not written (File too large)" in caplog.text
    file.write(["last"])
    file.close()
    lines = path.read_text().splitlines()
    assert lines[0] == "first" and lines[-1] == "last" and len(lines) == 11
    assert all(len(line) == 99 for line in lines[1:-1]), "no half of a line stays"


def test_a_disk_that_is_full_at_the_start_does_not_cost_the_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_observer, "FLUSH_S", 1e9)  # however long the first step takes
    model, optimizer = wrapped(alone(), log=tmp_path / "run.jsonl", trace=tmp_path / "trace.json")
    observer: Any = optimizer.ledger.observer
    for step in range(3):
        optimizer.zero_grad()
        model.backward(0, step)
        optimizer.step()
        if step == 0:
            with full_disk(0):
                observer.flush()
    optimizer.close_logs()
    assert read_run(tmp_path / "run.jsonl", "run").step.tolist() == [1, 2]
    assert (tmp_path / "trace.json").read_text().startswith("[\n")


def test_a_file_that_cannot_be_written_keeps_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("half of a line")
    files = len(os.listdir("/proc/self/fd"))
    file = LineFile(path, goes_on=True)
    with full_disk(path.stat().st_size):
        assert not any(file.write(["more"]) for _ in range(5))
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_file_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(tmp_path / "trace.json", most_bytes=1000)
    for _ in range(100):
        file.write(["x" * 99])
    file.close()
    assert (tmp_path / "trace.json").stat().st_size == 1000
    assert "trace.json has 1000 bytes: no more is written to it" in caplog.text


def test_a_file_that_is_removed_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(tmp_path / "run.jsonl")
    file.write(["first"])
    (tmp_path / "run.jsonl").unlink()
    with caplog.at_level(logging.ERROR):
        assert not any(file.write(["more"]) for _ in range(3))
    file.close()
    assert len(caplog.records) == 1 and "run.jsonl was removed: no more is written to it" in caplog.text


def test_a_file_that_another_host_has_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = LineFile(tmp_path / "run.jsonl")
    file.write(["first"])

    def stale(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)  # as NFS does
        is_written = file.write(["more"])
    assert not is_written and not file.write(["yet more"])
    assert "run.jsonl was removed: no more is written to it" in caplog.text


def test_files_lie_where_the_program_was_when_it_named_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, optimizer = wrapped(alone(), log="logs/run.jsonl", trace="logs/trace.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    optimizer.zero_grad()
    model.backward(0, 0)
    optimizer.step()
    optimizer.close_logs()
    assert read_run(tmp_path / "logs" / "run.jsonl", "run").step.tolist() == [0]
    assert (tmp_path / "logs" / "trace.json").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_long_runs_have_fewer_lines() -> None:
    lines, step = 0, 0
    while step < 1_000_000:
        width = steps_of_line(step)
        assert step % width == 0 and steps_of_line(step + width - 1) == width
        lines, step = lines + 1, step + width
    assert steps_of_line(SINGLE_STEPS - 1) == 1 and steps_of_line(SINGLE_STEPS) == 2
    assert lines == 42_813


def test_a_line_that_is_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model, optimizer = wrapped(alone(), log=path)
    for step in range(3):
        optimizer.zero_grad()
        model.backward(0, step)
        optimizer.step()
    optimizer.close_logs()
    path.write_bytes(path.read_bytes()[:-20])
    assert read_run(path, "run").step.tolist() == [0, 1]


def test_the_cost_of_a_log_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--json", str(tmp_path / "cost.json"), "--keep", str(tmp_path / "run.jsonl")]
    monkeypatch.setattr(logging_cost, "WARM_UP", 2)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["logging_cost", "--steps", "12", "--side", "100", *places])
        logging_cost.main()
    first, second = json.loads((tmp_path / "cost.json").read_text())
    assert first.keys() == second.keys() and (first["ranks"], first["coordinates"]) == (1, 10_000)
    assert first["parts_s"].keys() == {"values", "spans", "norms", "end of the step"}
    assert sum(first["parts_s"].values()) == pytest.approx(first["log_s"]) and 0 < first["share"] < 1
    assert read_run(tmp_path / "run.jsonl", "run").step.tolist() == list(range(12))


def test_the_log_of_local_steps_goes_on_within_a_round(tmp_path: Path) -> None:
    path, state = tmp_path / "run.jsonl", {}
    for start, stop in ((0, EVERY + 2), (EVERY + 2, 3 * EVERY)):
        model, optimizer = local_steps(alone(), log=path)
        if state:
            optimizer.load_state_dict(state)
        for step in range(start, stop):
            optimizer.zero_grad()
            model.backward(0, step)
            optimizer.log_values(step=step)
            optimizer.step()
        state = optimizer.state_dict()
        optimizer.close_logs()
    run = read_run(path, "run")
    assert run.step.tolist() == [0, 1, 2]
    assert run.values["step"].values.tolist() == [4.5, 6.5, 9.5]  # of 4 and 5, after exchange 0; 6 and 7; 8 to 11


def test_log_and_trace_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be different places"):
        wrapped(alone(), log=tmp_path / "run.jsonl", trace=f"{tmp_path}/run.jsonl")
