"""Runs a shell command on each of several hosts, through ssh where it is another one: where one fails, all end.

    python launch/on_hosts.py HOST COMMAND [HOST COMMAND …]

They run in the folder of the caller, and end with the caller, however that ends. The status is that of the first to
fail.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

END_LIMIT_S = 20  # for commands that were told to end
POLL_S = 0.05
HERE = "--here"  # of this host's part: a command that ends with its standard input, and so with the ssh that began it


def main(pairs: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    hosts = pairs[::2]
    running = [start(host, command) for host, command in zip(hosts, pairs[1::2], strict=True)]
    try:
        while any(process.poll() is None for process in running):
            for host, process in zip(hosts, running, strict=True):
                if process.poll():
                    status = to_status(process.poll())
                    print(f"{sys.argv[0]}: {host} ended with status {status}, ending all", file=sys.stderr)
                    return status
            time.sleep(POLL_S)
        return max(to_status(process.poll()) for process in running)
    finally:
        end(running)


def start(host: str, command: str) -> subprocess.Popen[bytes]:
    """The command on a host; it lasts no longer than its standard input."""
    here = [sys.executable, os.path.abspath(__file__), HERE, command]
    is_this = host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())
    line = here if is_this else ["ssh", host, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(here)}"]
    return subprocess.Popen(line, stdin=subprocess.PIPE)


def end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.stdin is not None:
            process.stdin.close()
    deadline_s = time.monotonic() + END_LIMIT_S
    for process in running:
        try:
            process.wait(max(deadline_s - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()


def run_here(command: str) -> int:
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdin=subprocess.DEVNULL)

    def end_with_input() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        process.terminate()

    threading.Thread(target=end_with_input, daemon=True).start()
    return to_status(process.wait())


def to_status(returned: int | None) -> int:
    """A shell's exit status: of a process that a signal ended, 128 and its number."""
    return 0 if returned is None else returned if returned >= 0 else 128 - returned


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[2]) if sys.argv[1:2] == [HERE] else main(sys.argv[1:]))
