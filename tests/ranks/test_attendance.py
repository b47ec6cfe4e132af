"""What ranks tell each other outside of collectives: who has come, who waits elsewhere, whose program is over."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import LocalTransport, attendance, metered, processes, run_local
from hvd_sketch.transport.attendance import Attendance, StoreAttendance
from hvd_sketch.transport.metered import MeteredTransport
from hvd_sketch.transport.processes import Fate, Process
from hvd_sketch.transport.stall import StallWatch
from hvd_sketch.transport.words import Says, Word
from tests.support.harness import child_environment, wait_until

LIMIT_S = 60
# Rank RANK of two; with port 0 it also keeps the store.
OTHER_RANK = """
import sys, time
from torch.distributed import TCPStore
from hvd_sketch.transport.attendance import StoreAttendance
rank, port = map(int, sys.argv[1:])
store = TCPStore("127.0.0.1", port, is_master=not port, wait_for_workers=False)
attendance = StoreAttendance(store, rank, 2)
print(store.port, flush=True)
time.sleep(100)
"""


def on_ranks(size: int, program: Callable[[Attendance], str]) -> list[str]:
    """What a program returns on every rank, or the RuntimeError that it ends with."""
    store = HashStore()
    ranks = [StoreAttendance(store, rank, size) for rank in range(size)]

    def run(attendance: Attendance) -> str:
        try:
            return program(attendance)
        except RuntimeError as error:
            return str(error)

    try:
        with ThreadPoolExecutor(size) as pool:
            return [each.result(LIMIT_S) for each in [pool.submit(run, attendance) for attendance in ranks]]
    finally:
        for attendance in ranks:
            attendance.close()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_meet_as_often_as_they_like(size: int) -> None:
    def program(attendance: Attendance) -> str:
        for number in range(20):
            attendance.meet(f"place {number % 3}")
        return "met"

    assert on_ranks(size, program) == ["met"] * size


def test_a_forked_process_does_not_end_for_its_parent() -> None:
    attendance = StoreAttendance(HashStore(), 0, 1)
    child = os.fork()
    if child == 0:
        attendance._end()
        os._exit(int(attendance._is_over))
    assert os.waitpid(child, 0)[1] == 0
    attendance.close()


def test_those_who_wait_elsewhere_are_named() -> None:
    def program(attendance: Attendance) -> str:
        if attendance.rank == 1:
            attendance.come()
            attendance.say(Says.WAITS, "agree")
            return "in a step"
        attendance.meet("save" if attendance.rank else "load")
        return "met"

    messages = on_ranks(3, program)
    assert messages[0].startswith("rank 0 of 3 has come to 'load', but others wait elsewhere, in 'agree': rank 1")
    assert messages[1] == "in a step"
    assert messages[2].startswith("rank 2 of 3 has come to 'save', but others wait elsewhere, in ")


def test_a_rank_that_has_ended_is_named() -> None:
    def program(attendance: Attendance) -> str:
        attendance.meet("first")
        if attendance.rank == 2:
            attendance.say(Says.ENDED)
            return "over"
        attendance.meet("second")
        return "met"

    messages = on_ranks(3, program)
    assert messages[0] == messages[1].replace("rank 1 of", "rank 0 of")
    assert messages[0].startswith("rank 0 of 3 has come to 'second', but the program of rank 2 is over")


def test_who_leaves_in_a_collective_is_not_taken_for_one_who_has_ended_it() -> None:
    def program(attendance: Attendance, ends_it: bool) -> str:
        attendance.meet("first")
        attendance.come()
        if attendance.rank == 1:
            if ends_it:
                attendance.leave()
            attendance.say(Says.ENDED)
            return ""
        wait_until(lambda: attendance.listen() or attendance.heard[1].says == Says.ENDED)
        return attendance.elsewhere("agree")

    assert on_ranks(2, partial(program, ends_it=True)) == ["", ""]
    assert on_ranks(2, partial(program, ends_it=False))[0].startswith("the program of rank 1 is over")


def test_who_has_gone_on_already_has_been_here() -> None:
    """A rank that has been seen by all may be in a later collective, elsewhere, when a slow rank looks."""
    store = HashStore()
    slow, fast = (StoreAttendance(store, rank, 2) for rank in range(2))
    fast.begun = 7
    fast.say(Says.WAITS, "agree")
    slow.begun = 5
    slow.meet("save")
    assert slow.begun == 6 and slow.absent() == []


def test_a_word_survives() -> None:
    word = Word(Says.JOINED, 2**40, "einen Prüfpunkt „speichern“")
    assert Word.decode(word.encode()) == word


@contextmanager
def other_rank(rank: int, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that is a rank, and the port of the store."""
    command = [sys.executable, "-c", OTHER_RANK, str(rank), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.multiprocess
def test_who_waits_is_heard_while_the_store_is_frozen_and_when_it_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A question to a store that is frozen does not come back, whatever its timeout."""
    with other_rank(0) as (process, port):
        store = TCPStore("127.0.0.1", port, is_master=False)
        mine = StoreAttendance(store, 1, 2)
        mine.listen()
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: mine.heard[0].process.fate() == Fate.STOPPED)
        mine.come()
        with StallWatch(3.0).over(1, 2, 3, "agree", mine):
            wait_until(lambda: caplog.messages, timeout_s=20)
        assert " s for the other ranks, in step 3, phase 'agree'. Who has come is not known" in caplog.messages[0]
        assert f"Who has come is not known: the store at 127.0.0.1:{port} by which the ranks met, on the host of " in (
            caplog.text
        )
        assert "Rank 0 is stopped, by a signal or a debugger." in caplog.text
        process.kill()
        process.wait()
        started_s = time.monotonic()
        with pytest.raises(RuntimeError, match=r"come to 'save', but .*rank 0.*ended"):
            mine.meet("save")
        assert time.monotonic() - started_s < 5


@pytest.mark.multiprocess
def test_a_rank_that_was_killed_is_not_waited_for() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = StoreAttendance(store, 0, 2)
    with other_rank(1, store.port) as (process, _), ThreadPoolExecutor(1) as pool:
        waits = pool.submit(mine.meet, "be set up")
        time.sleep(0.5)
        assert not waits.done()
        process.kill()
        with pytest.raises(RuntimeError, match="'be set up', but rank 1 ended without a word: killed, or crashed"):
            waits.result(5)
    mine.close()


def test_a_rank_of_another_host_is_named_when_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "SILENT_S", 0.2)
    monkeypatch.setattr(attendance, "LOST_S", 0.6)
    store = HashStore()
    near, far = (StoreAttendance(store, rank, 2) for rank in range(2))
    far._said = replace(far._said, process=Process("another host", 1, 1))
    far.say(Says.WAITS, "agree")
    near.begun = 7
    near.say(Says.WAITS, "agree")
    far.listen()

    def listen_for(seconds: float) -> None:
        for _ in range(10):
            time.sleep(seconds / 10)
            near.listen()

    listen_for(0.4)
    assert near.describe_absent() == "", "nothing is known of a rank that never looks at who waits"
    for _ in range(3):
        far.answer()
        listen_for(0.15)
        assert near.describe_absent() == "" and near.elsewhere("agree") == ""
    listen_for(0.3)
    assert near.describe_absent().startswith("Rank 1 has not answered for 0 s: stopped, or its host lost")
    listen_for(0.5)
    assert "nothing was heard of rank 1 for" in near.elsewhere("agree")
    assert near.absent() == [1]


def test_in_another_namespaces_table_nothing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ``unshare --pid`` without ``--mount-proc``: a rank that runs is not to be taken for one that ended."""
    monkeypatch.setattr(processes, "PROCESSES", tmp_path)
    there = str(os.getpid() + 1)  # what this process is called in that table
    (tmp_path / there / "ns").mkdir(parents=True)
    (tmp_path / there / "ns/pid").symlink_to("pid:[1]")
    (tmp_path / "self").symlink_to(there)
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("boot\n")
    assert Process.of(os.getpid()).fate() == Fate.UNKNOWN


def test_what_becomes_of_a_process_is_seen_on_its_host() -> None:
    own = Process.of(os.getpid())
    assert own.fate() == Fate.RUNS
    assert replace(own, host="another host").fate() == Fate.UNKNOWN
    assert replace(own, started=own.started - 1).fate() == Fate.OVER, "another process had this number"
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        other = Process.of(sleeper.pid)
        assert other.fate() == Fate.RUNS
        sleeper.send_signal(signal.SIGSTOP)
        wait_until(lambda: other.fate() == Fate.STOPPED)
        sleeper.kill()
        wait_until(lambda: other.fate() == Fate.OVER)  # before anybody has asked for its status
    assert other.fate() == Fate.OVER


def test_only_waiting_for_others_is_waiting(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Long work of this rank within a phase is not: neither for the warning nor for the end."""
    watch = StallWatch(0.5)
    monkeypatch.setattr(metered, "process_watch", lambda: watch)

    def rank_main(transport: LocalTransport) -> int:
        comm = MeteredTransport(transport, CommLedger())
        with comm.phase("sketch"):
            comm.allreduce_(torch.zeros(1))
            time.sleep(1.2)
            comm.allreduce_(torch.zeros(1))
            early = len(caplog.messages)
            time.sleep(1.2 * transport.rank)
            comm.allreduce_(torch.zeros(1))
        return early

    with caplog.at_level(logging.WARNING):
        assert run_local(2, rank_main, LIMIT_S) == [0, 0]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("rank 0 of 2 has waited for 1 s for the other")


def test_the_ranks_of_a_wait_that_is_over_are_forgotten() -> None:
    """As those of an elastic job's former worlds."""
    store, watch = HashStore(), StallWatch(0.12)
    ranks = [StoreAttendance(store, rank, 2) for rank in range(2)]
    with watch.over(0, 2, None, "first", ranks[0]), watch.over(0, 2, None, "second", ranks[1]):
        time.sleep(0.1)
    left = [weakref.ref(attendance) for attendance in ranks]
    ranks.clear()
    time.sleep(0.1)
    wait_until(lambda: gc.collect() >= 0 and all(each() is None for each in left), timeout_s=5)


def test_of_nested_waits_the_innermost_counts(caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch(0.3)
    with caplog.at_level(logging.WARNING), watch.over(0, 2, None, "outer"):
        time.sleep(0.2)
        with watch.over(0, 2, None, "inner"):
            time.sleep(0.6)
        told = list(caplog.messages)
        time.sleep(0.1)
    assert [("'inner'" in message, "'outer'" in message) for message in told] == [(True, False)]
    assert caplog.messages == told
