"""Running a command on a lab, and the report of what every host sent and received meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from netlab_lib.lab import ENDINGS, INTERFACE, Lab, note, reserved, write_whole
from netlab_lib.network import read_counters
from netlab_lib.processes import END_LIMIT_S, end_guests
from netlab_lib.remote_shell import LOGIN_PATH


def run(lab: Lab, command: list[str], report_path: Path | None) -> int:
    """Run a command on the first host; report what every host sent and received meanwhile. Returns its status."""
    with reserved(lab.name):
        end_guests(lab)  # of a run that was killed
        before, start_s = read_counters(lab), time.monotonic()
        try:
            status = supervise(lab, command)
            elapsed_s = time.monotonic() - start_s
            after = counters_if_up(lab)
        finally:
            end_guests(lab)
    differences = [
        (host.name, sent - sent_before, got - got_before)
        for host, (sent, got), (sent_before, got_before) in zip(lab.hosts, after, before, strict=bool(after))
    ]
    hosts = [{"name": name, "sent_bytes": sent, "received_bytes": got} for name, sent, got in differences]
    for name, sent, got in differences:
        note(f"{name} sent {sent:,} and received {got:,} bytes")
    note(f"{elapsed_s:.1f} s, exit status {status}")
    if report_path:
        report = {"hosts": hosts, "elapsed_s": round(elapsed_s, 3), "exit_status": status}
        write_whole(report_path, json.dumps(report, indent=2) + "\n")
    return status


def counters_if_up(lab: Lab) -> list[tuple[int, int]]:
    """What the interfaces counted; nothing if the lab is gone."""
    try:
        return read_counters(lab)
    except OSError:
        note(f"lab {lab.name} was removed while the command ran: what its hosts sent is not known")
        return []


def supervise(lab: Lab, command: list[str]) -> int:
    """The command's exit status; signals are passed on, and a command that does not heed them is killed."""
    lab_variables = {
        "NETLAB": lab.name,
        "NETLAB_HOSTS_FILE": str(lab.folder / "hosts"),
        "NETLAB_HOSTS": ",".join(f"{host.name}:{lab.slots}" for host in lab.hosts),
        "NETLAB_INTERFACE": INTERFACE,
        "OMPI_MCA_plm_rsh_agent": str(lab.folder / "bin/ssh"),
        "PATH": f"{lab.folder / 'bin'}:{os.environ.get('PATH', LOGIN_PATH)}",
    }
    # The hosts share this machine's cores, which Open MPI cannot see: ranks that wait must let others run (at 4 hosts
    # on 2 cores and 1 Gbit/s an allgather reached 490 Mbit/s with it, 400 without).
    shared_cores = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    line = lab.hosts[0].inside("env", f"--chdir={os.getcwd()}", *command)
    # In a session of its own, so that a Ctrl-C reaches it once: mpirun takes the second for "now, and untidily".
    process = subprocess.Popen(line, env=shared_cores | os.environ | lab_variables, start_new_session=True)

    def pass_on(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if number == signal.SIGALRM else number)
        signal.alarm(END_LIMIT_S)

    for number in (*ENDINGS, signal.SIGALRM):
        signal.signal(number, pass_on)
    status = process.wait()
    for number in ENDINGS:  # what follows, the report and the end of strays, is short and must not be cut off
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(0)
    return status if status >= 0 else 128 - status
