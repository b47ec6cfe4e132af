"""What an optimizer writes about its steps: equal to what the ledger counts, whole after a kill, never in the way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hvd_sketch import logs
from hvd_sketch.commands.merge_traces import merge_traces
from hvd_sketch.logs.line_file import LineFile
from hvd_sketch.logs.run_log import SINGLE_STEPS, steps_of_line
from hvd_sketch.logs.step_observer import Output, StepObserver
from hvd_sketch.report.runs import read_run
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.harness import started
from tests.support.logged import SKIPPED, SLOW_RANK, SLOW_S, STEPS, train, wrapped
from tests.support.saving import full_disk
from tests.support.toy import LIMIT_S, alone
from tests.support.worlds import register

pytestmark = pytest.mark.filterwarnings("ignore:all ranks skip this step")
JOB = register("mpi", 2, "tests.support.logged:train")
FOLDER = TemporaryDirectory()  # of the groups' logs; until the tests end
GROUPS = register("torch", 4, "tests.support.logged_groups:train_in_groups", folder=FOLDER.name)


@pytest.fixture(scope="module", params=[pytest.param("threads"), pytest.param("mpi", marks=pytest.mark.multiprocess)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What each rank of a run knows; its files are in ``folder``."""
    if request.param == "mpi":
        results = JOB.results()
    else:
        folder = str(tmp_path_factory.mktemp("logged"))
        results = run_local(3, lambda transport: train(transport, folder), LIMIT_S)
    yield results
    shutil.rmtree(results[0]["folder"])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_has_what_the_ledger_counts(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        name = "run.jsonl" if rank == 0 else f"run.rank{rank}.jsonl"
        about, *steps, last = lines_of(Path(result["folder"], name))
        assert (about["rank"], about["size"], about["optimizer"]["class"]) == (rank, len(ranks), "SGD")
        assert about["compression"]["k"] == 10 and (about["elements"], about["elements_compressed"]) == (63, 60)
        assert [line["step"] for line in steps] == list(range(STEPS)) and last == {"values": {"accuracy": 0.25}}
        sent = [sum(count for count, _ in line["phases"].values()) for line in steps]
        assert torch.tensor(sent).cumsum(0).tolist() == result["sent"]
        assert [line["skipped"] for line in steps] == [int(step == SKIPPED) for step in range(STEPS)]
        dense = round(2 * 63 * 4 * (len(ranks) - 1) / len(ranks))
        assert [line["dense_bytes"] for line in steps] == [0 if step == SKIPPED else dense for step in range(STEPS)]
        assert [line["values"] for line in steps] == [{"loss": 2 * rank + s + 1, "lr": 0.5} for s in range(STEPS)]
        assert sum(line["step_s"] for line in steps) == pytest.approx(steps[-1]["time_s"], abs=1e-4)
        assert all(sum(s for _, s in line["phases"].values()) <= line["exchange_s"] for line in steps)


def test_a_report_finds_the_rank_that_others_wait_for(ranks: list[dict[str, Any]]) -> None:
    run = read_run(Path(ranks[0]["folder"], "run.jsonl"), "run")
    assert run.has_all_ranks and run.sent_so_far[-1] == pytest.approx(ranks[0]["sent"][-1])
    waiting_s = np.median(run.parts_s["waiting for the slowest"], axis=1)  # whatever else this machine does
    others = [seconds for rank, seconds in enumerate(waiting_s) if rank != SLOW_RANK]
    assert waiting_s[SLOW_RANK] < 0.5 * SLOW_S < 0.8 * SLOW_S < min(others), waiting_s
    assert all((seconds >= 0).all() for seconds in run.parts_s.values())
    assert sum(run.parts_s.values()) == pytest.approx(run.step_s, abs=1e-4)
    assert run.values["loss"].values.tolist() == [len(ranks) + step for step in range(STEPS)]  # mean over ranks
    assert run.values["accuracy"].at.tolist() == [STEPS - 1]


def test_a_trace_nests_and_agrees_with_the_log(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        folder, of_rank = Path(result["folder"]), f".rank{rank}" * (rank > 0)
        text = (folder / f"trace{of_rank}.json").read_text()
        events = [event for event in json.loads(text.rstrip(",\n") + "]") if event["ph"] == "X"]
        assert {event["pid"] for event in events} == {rank}
        exchanges = [event for event in events if event["cat"] == "exchange"]
        logged = [line["exchange_s"] for line in lines_of(folder / f"run{of_rank}.jsonl")[1:-1]]
        assert [event["dur"] * 1e-6 for event in exchanges] == pytest.approx(logged, abs=2e-6)
        for event in events:
            if event["cat"] in ("phase", "collective", "local"):
                assert any(inside(event, exchange) for exchange in exchanges), event
        assert len([event for event in events if event["cat"] == "step"]) == STEPS
        assert {"agree", "sketch", "accumulate", "allreduce"} <= {event["name"] for event in events}


def inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    slack_us = 0.01
    ends = event["ts"] + event["dur"] <= outer["ts"] + outer["dur"] + slack_us
    return outer["ts"] <= event["ts"] + slack_us and ends


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
    merge_traces(files, tmp_path / "merged.json")
    events = json.loads((tmp_path / "merged.json").read_text())["traceEvents"]
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


def test_tensorboard_reads_the_scalars(ranks: list[dict[str, Any]]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(f"{ranks[0]['folder']}/scalars").Reload()
    scalars = {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert scalars["loss"] == {step: step + 1 for step in range(STEPS)}
    assert scalars["accuracy"] == {STEPS - 1: 0.25}
    assert scalars["exchange/sent_bytes"] == {0: ranks[0]["sent"][0], 10: ranks[0]["sent"][10]}
    steps = lines_of(Path(ranks[0]["folder"], "run.jsonl"))[1:-1]
    for tag, key in (("exchange/residual_norm", "residual_norm"), ("exchange/captured_energy", "captured")):
        assert scalars[tag] == {0: pytest.approx(steps[0][key], rel=1e-4)}
    assert scalars["exchange/ratio"][10] > 0


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


def test_a_place_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank_main(transport: LocalTransport) -> str:
        places = {"log": tmp_path / "file" / "run.jsonl"} if transport.rank == 1 else {}
        with pytest.raises((OSError, RuntimeError)) as refused:
            wrapped(transport, **places)
        return str(refused.value)

    told = run_local(2, rank_main, LIMIT_S)
    assert "file" in told[1] and "rank 1" in told[0]


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


@pytest.mark.multiprocess
def test_shards_write_side_by_side() -> None:
    folder = Path(FOLDER.name)
    results = GROUPS.results()
    names = ["sharded.jsonl", "sharded.shard1.jsonl", "sharded.rank1.jsonl", "sharded.shard1.rank1.jsonl"]
    assert sorted(path.name for path in folder.glob("sharded*")) == sorted(names) and len([*folder.glob("trace*")]) == 4
    for name, result in zip(names, results, strict=True):
        sent = [sum(count for count, _ in line["phases"].values()) for line in lines_of(folder / name)[1:]]
        assert sum(sent) == result["sharded"] and len(sent) == len(result["said"])
        assert all("'norm', a DTensor: log norm.full_tensor()" in said for said in result["said"])
    for shard in ("sharded", "sharded.shard1"):
        assert read_run(folder / f"{shard}.jsonl", shard).has_all_ranks


@pytest.mark.multiprocess
def test_with_levels_only_leaders_tell_of_the_network() -> None:
    sent = [result["levels"] for result in GROUPS.results()]
    run = read_run(Path(FOLDER.name, "levels.jsonl"), "levels")
    assert run.has_all_ranks and run.ranks == [0, 2] and sent[1] == sent[3] == 0
    assert run.sent_so_far[-1] == pytest.approx((sent[0] + sent[2]) / 2)
    assert run.dense_bytes.tolist() == [63 * 4.0] * len(run.step), "between two hosts, not four ranks"
    assert (run.parts_s["network"] > 0).all()
    assert run.values["loss"].values.tolist() == [1.5] * len(run.step)  # of all ranks


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
    for number in range(5000):
        optimizer.log_values(loss=number + 0.5)
    taken = tracemalloc.take_snapshot()
    tracemalloc.stop()
    # Of the logs alone: the threads that run other tests' jobs allocate meanwhile.
    of_logs = taken.filter_traces([tracemalloc.Filter(True, f"{Path(logs.__file__).parent}/*")])
    assert sum(trace.size for trace in of_logs.traces) < 10_000


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


def test_a_disk_that_is_full_at_the_start_does_not_cost_the_first_line(tmp_path: Path) -> None:
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


def test_long_runs_have_fewer_lines() -> None:
    lines, step = 0, 0
    while step < 1_000_000:
        width = steps_of_line(step)
        assert step % width == 0 and steps_of_line(step + width - 1) == width
        lines, step = lines + 1, step + width
    assert steps_of_line(SINGLE_STEPS - 1) == 1 and steps_of_line(SINGLE_STEPS) == 2
    assert lines == 42_813


@pytest.mark.multiprocess
def test_a_kill_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "tests.support.logged", str(path)]
    with started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not path.exists() or path.stat().st_size < 5000:
            done = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert path.read_bytes().endswith(b"\n")
    steps = [line["step"] for line in lines_of(path)[1:]]
    assert steps == list(range(len(steps))) and 0 < len(steps) <= done + 2


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
