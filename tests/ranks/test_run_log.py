"""What optimizers of several ranks write about their steps: equal to what the ledger counts, whole after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from hvd_sketch.report.runs import read_run
from hvd_sketch.report.tables import summary
from hvd_sketch.transport import LocalTransport, run_local
from tests.support.harness import started
from tests.support.logged import (
    EVERY,
    ROUNDS,
    SKIPPED,
    SLOW_RANK,
    SLOW_S,
    STEPS,
    lines_of,
    local_steps,
    train,
    train_local_steps,
    wrapped,
)
from tests.support.toy import LIMIT_S
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


def test_a_place_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank_main(transport: LocalTransport) -> str:
        places = {"log": tmp_path / "file" / "run.jsonl"} if transport.rank == 1 else {}
        with pytest.raises((OSError, RuntimeError)) as refused:
            wrapped(transport, **places)
        return str(refused.value)

    told = run_local(2, rank_main, LIMIT_S)
    assert "file" in told[1] and "rank 1" in told[0]


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


def test_a_step_of_local_steps_is_an_exchange(tmp_path: Path) -> None:
    ranks = run_local(3, lambda transport: train_local_steps(transport, str(tmp_path)), LIMIT_S)
    steps_of_rounds = [EVERY] * (ROUNDS - 1) + [EVERY // 2]  # the last by sync()
    for rank, result in enumerate(ranks):
        about, *exchanges = lines_of(tmp_path / ("run.jsonl" if rank == 0 else f"run.rank{rank}.jsonl"))
        assert about["every"] == EVERY and about["optimizer"]["class"] == "SGD"
        assert about["outer optimizer"]["momentum"] == 0.5 and about["elements_compressed"] == 60
        assert [line["step"] for line in exchanges] == list(range(ROUNDS))
        assert [line["skipped"] for line in exchanges] == [0, 1, 0, 0]
        sent = [sum(count for count, _ in line["phases"].values()) for line in exchanges]
        assert torch.tensor(sent).cumsum(0).tolist() == result["sent"]
        # Of each training step, but not of the exchange that was skipped.
        dense = [round(2 * 63 * 4 * 2 / 3 * (steps - (at == 1))) for at, steps in enumerate(steps_of_rounds)]
        assert [line["dense_bytes"] for line in exchanges] == dense
        assert [line["values"]["loss"] for line in exchanges] == [EVERY * at + 1.5 for at in range(ROUNDS - 1)] + [12.5]
        assert sum(line["step_s"] for line in exchanges) == pytest.approx(exchanges[-1]["time_s"], abs=1e-4)
        own_s = [line["step_s"] - line["exchange_s"] for line in exchanges]
        assert rank != SLOW_RANK or min(own_s[:-1]) > EVERY * SLOW_S / 2, "also of the steps before the first exchange"
        trace = (tmp_path / ("trace.json" if rank == 0 else f"trace.rank{rank}.json")).read_text()
        assert trace.count('"name":"differences"') == trace.count('"name":"exchange"') == ROUNDS
    run = read_run(tmp_path / "run.jsonl", "run")
    assert run.has_all_ranks and np.sum(run.parts_s["waiting for the slowest"][0]) > SLOW_S
    told = {name: texts[0] for name, texts in summary([run]).rows}
    assert told["steps"] == f"{ROUNDS}, exchanges after {EVERY} steps of a rank"


def test_steps_of_a_round_that_is_interrupted_are_in_the_log(tmp_path: Path) -> None:
    path, starts, own_s = tmp_path / "run.jsonl", (EVERY + 2, 2 * EVERY), 0.01

    def rank_main(transport: LocalTransport) -> int:
        state: dict[str, Any] = {}
        for steps in starts:
            model, optimizer = local_steps(transport, log=path)
            if state:
                optimizer.load_state_dict(state)
            for step in range(steps):
                optimizer.zero_grad()
                model.backward(transport.rank, step)
                time.sleep(own_s)
                optimizer.step()
            state = optimizer.state_dict()
            optimizer.close_logs()
            optimizer.close_logs()  # writes nothing twice
        return optimizer.ledger.dense_ring_bytes

    counted = run_local(2, rank_main, LIMIT_S)
    run = read_run(path, "run")
    assert run.step.tolist() == [0, 1, 2] and run.has_all_ranks
    assert counted == [2 * run.dense_bytes.sum()] * 2 == [2 * 63 * 4 * sum(starts)] * 2
    assert np.nansum(run.step_s[0]) > own_s * (sum(starts) - 2) and (np.diff(run.time_s) > 0).all()


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    places = {"log": tmp_path / "run.jsonl", "tensorboard": tmp_path / "scalars"}

    def rank_main(transport: LocalTransport) -> list[int]:
        """What the rank sent up to the end of each step, without a break."""
        model, optimizer = wrapped(transport)
        sent, state = take_steps(model, optimizer, range(21), saves_at=7)
        other, resumed = wrapped(transport, **places)
        resumed.load_state_dict(state)
        take_steps(other, resumed, range(7, 12))
        resumed.load_state_dict(state)  # as after a failure, in the middle of a run
        assert take_steps(other, resumed, range(7, 21))[0] == sent[7:]
        resumed.close_logs()
        return sent

    def take_steps(model: Any, optimizer: Any, steps: range, saves_at: int = -1) -> tuple[list[int], dict[str, Any]]:
        sent, state = [], {}
        for step in steps:
            if step == saves_at:
                state = optimizer.state_dict()
            optimizer.zero_grad()
            model.backward(optimizer.transport.rank, step)
            optimizer.step()
            sent.append(optimizer.ledger.totals().wire_bytes)
        return sent, state

    sent = run_local(2, rank_main, LIMIT_S)[0]
    scalars = accumulator.EventAccumulator(str(tmp_path / "scalars")).Reload().Scalars("exchange/sent_bytes")
    assert {event.step: event.value for event in scalars} == {step: sent[step] for step in (7, 10, 20)}
    run = read_run(tmp_path / "run.jsonl", "run")
    assert run.step.tolist() == list(range(7, 21)) and run.sent_so_far.tolist() == [each - sent[6] for each in sent[7:]]
