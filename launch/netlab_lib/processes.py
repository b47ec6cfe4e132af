"""The processes of a lab: which they are, and how they end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from netlab_lib.lab import Lab, LabError, note

END_LIMIT_S = 10  # for a process that was told to end
LEAVE_LIMIT_S = 2  # for what a command leaves behind to end by itself
# Every process of a host sees this mount, whoever started it and whatever became of its parents.
MARK = re.compile(r"/netlab/(?P<lab>[^/ ]+)/(?P<host>[^/ ]+)\.hosts(?://deleted)? /etc/hosts ")


def residents(lab: str) -> dict[int, str]:
    """The processes that live in a lab, each with the name of its host."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with suppress(OSError):  # it has ended
            mark = MARK.search(path.read_text())
            if mark and mark["lab"] == lab:
                found[int(path.parent.name)] = mark["host"]
    return found


def guests(lab: Lab, host: str | None = None) -> list[int]:
    """The processes of commands, on one host or on all: residents that do not belong to the hosts themselves."""
    own = {pid for each in [lab.switch, *lab.hosts] for pid in each.pids}
    return [pid for pid, where in residents(lab.name).items() if pid not in own and host in (None, where)]


def end(find: Callable[[], Iterable[int]]) -> int:
    """Kill what ``find`` finds until it finds nothing; returns how many processes that were."""
    killed: set[int] = set()
    deadline_s = time.monotonic() + END_LIMIT_S
    while pids := list(find()):
        if time.monotonic() > deadline_s:
            raise LabError(f"processes {pids} are still there {END_LIMIT_S} s after SIGKILL")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        time.sleep(0.02)
    return len(killed)


def end_guests(lab: Lab) -> None:
    """End what a command left behind, after a moment in which it may go by itself."""
    deadline_s = time.monotonic() + LEAVE_LIMIT_S
    while guests(lab) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    killed = end(lambda: guests(lab))
    if killed:
        note(f"ended {killed} processes that a command left behind")


def find_lab(name: str) -> Lab:
    """The lab of this name, all of whose hosts are there."""
    lab = Lab.load(name)
    living = residents(name)
    gone = [host.name for host in [lab.switch, *lab.hosts] if living.get(host.pids[0]) != host.name]
    if gone:
        raise LabError(f"somebody ended the processes that hold {', '.join(gone)}: build the lab anew with 'up'")
    return lab
