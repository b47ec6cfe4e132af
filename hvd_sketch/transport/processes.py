"""What has become of a process, as the process table of its host tells; only ranks of the same host can ask."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PROCESSES = Path("/proc")


class Fate(Enum):
    """What has become of a process."""

    UNKNOWN = 0  # it is on another host, or this system has no table of processes
    RUNS = 1
    STOPPED = 2  # by a signal or a debugger
    OVER = 3


@dataclass(frozen=True)
class Process:
    """One process of one host.

    Attributes:
        host: the start of the system and the namespace in which ``pid`` counts; "": unknown.
        pid: its number, which may be given again to a later process.
        started: when it began, in clock ticks since the start of the system.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process of this host."""
        return cls(_host(), pid, _look_up(pid)[1])

    def fate(self) -> Fate:
        """What has become of it."""
        if not self.host or self.host != _host():
            return Fate.UNKNOWN
        state, started = _look_up(self.pid)
        if started != self.started or state in "ZX":
            return Fate.OVER
        return Fate.STOPPED if state in "Tt" else Fate.RUNS


NOBODY = Process("", 0, 0)


def _host() -> str:
    try:
        if (PROCESSES / "self").readlink() != Path(str(os.getpid())):
            return ""  # /proc shows another namespace's processes, among which our number is another one's
        boot = (PROCESSES / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROCESSES / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _look_up(pid: int) -> tuple[str, int]:
    """State and start of a process; ("X", -1) where there is none."""
    try:
        fields = (PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", -1
    return fields[0], int(fields[19])
