"""The watch over waits goes on whatever happens to the streams of a process, and while the whole process is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from hvd_sketch.transport import stall
from hvd_sketch.transport.stall import StallWatch
from tests.support.harness import child_environment, wait_until

LIMIT_S = 60
WAITS = """
import sys, time
from hvd_sketch.transport import stall

stall.LONGEST_LOOK_S = 0.5
{before}
with stall.StallWatch(0.6, {abort_s}).over(0, 2, None, "wait"):
    {stderr}.write("waits\\n"), {stderr}.flush()
    for _ in range({tenths}):
        time.sleep(0.1)
"""


def waiting(before: str, abort_s: float, tenths: int, stderr: str = "sys.stderr") -> subprocess.Popen[str]:
    """A process that waits for so many tenths of a second, once it does."""
    program = WAITS.format(before=before, abort_s=abort_s, tenths=tenths, stderr=stderr)
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment())
    assert process.stderr is not None
    assert process.stderr.readline() == "waits\n"
    return process


class Closed:
    """As a stream that was closed: logging cannot even tell of its own error."""

    def write(self, text: str) -> None:
        raise ValueError("I/O operation on closed file")


def test_who_cannot_write_errors_ends_all_the_same() -> None:
    before = "from tests.unit.test_stall import Closed\nstderr, sys.stderr = sys.stderr, Closed()"
    process = waiting(before, abort_s=1.0, tenths=10 * LIMIT_S, stderr="stderr")
    assert process.wait(timeout=LIMIT_S) == 1


@pytest.mark.parametrize("stdout", ["None", "open('/dev/full', 'w')"])
def test_who_cannot_write_ends_all_the_same(stdout: str) -> None:
    process = waiting(f"sys.stdout = {stdout}\nprint('epoch 0')", abort_s=1.0, tenths=10 * LIMIT_S)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1 and "HVD_SKETCH_STALL_ABORT_SECONDS is 1" in errors, errors


def test_a_process_that_is_stopped_does_not_wait() -> None:
    """As of a job that its scheduler suspends."""
    process = waiting("", abort_s=4.0, tenths=15)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("instead", [None, object()])
def test_where_threads_are_is_shown_whatever_stands_for_stderr(
    instead: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", instead)
    stall._show_threads()
    assert "test_where_threads_are_is_shown" in capfd.readouterr().err


def test_an_error_while_it_looks_is_told_once_and_it_looks_again(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        looked = 0

        def listen(self) -> None:
            self.looked += 1
            raise OSError("no words")

    broken: Any = Broken()
    with StallWatch(0.06).over(0, 2, None, "wait", broken):
        wait_until(lambda: broken.looked > 3, LIMIT_S)
    assert caplog.text.count("is tried again") == 1


def test_the_threads_end_with_the_watch() -> None:
    before = set(threading.enumerate())
    watch = StallWatch(0.06)
    with watch.over(0, 2, None, "wait"):
        started = set(threading.enumerate()) - before
    assert len(started) == 2
    del watch
    wait_until(lambda: not any(thread.is_alive() for thread in started), LIMIT_S)
