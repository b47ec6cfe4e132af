"""What ranks tell each other outside of collectives: who has come, who waits elsewhere, whose program is over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from hvd_sketch.transport.attendance import Attendance, Says, StoreAttendance, Word

LIMIT_S = 60


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
