"""What one look at a machine found, and the ways to look."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

COMMAND_S = 30
ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): \S.*")
State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Attributes:
        name: of the thing.
        state: "wrong" is to be mended; a "note" matters to some jobs only.
        told: one line.
        mend: what to do; empty where all is well.
        details: the last lines that a failed command printed, for ``--bundle`` and ``--json``.
    """

    name: str
    state: State
    told: str
    mend: str = ""
    details: str = ""


def imported(name: str, before: Callable[[], None] = lambda: None) -> Any:
    """A module, or the exception that importing it raised."""
    try:
        before()
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return error


def is_missing(error: Exception, package: str) -> bool:
    """Whether a package is not installed. Otherwise it is, and something else keeps it from being imported."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package


def output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails, or takes too long."""
    done = finished(*command)
    return done.stdout if done is not None and done.returncode == 0 else None


def finished(*command: str) -> subprocess.CompletedProcess[str] | None:
    """A command that has ended; None where it is missing, or takes too long."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # what other hosts print may be in another encoding
            timeout=COMMAND_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def telling_line(printed: str) -> str:
    """The line that says why a command failed: Python's first error, else the last line with a letter.

    Launchers end with rulers, and the errors after the first are often those of ranks that lost their peer.
    """
    lines = [line.strip() for line in printed.splitlines() if re.search(r"[^\W\d_]", line)]
    errors = [found[0] for line in lines if (found := ERROR.search(line))]
    return (errors[:1] or lines[-1:] or ["nothing was printed"])[0]
