"""launch/netlab: what it refuses, what it builds and leaves, what it counts, and jobs across its hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import FIRST_STEP_LIMIT_S, LAUNCHERS, ROOT, on_lab, run_command, started, wait_until
from tests.support.labs import MISSING, lab, needs_lab

NETLAB = "launch/netlab"
PYTHON = sys.executable
SHELLS = [
    "agent",
    pytest.param("sshd", marks=pytest.mark.skipif(not shutil.which("sshd"), reason="sshd is not installed")),
]
HOST_END_LIMIT_S = 60
NETEM = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
HAS_NETEM = not MISSING and subprocess.run(NETEM, capture_output=True, check=False).returncode == 0
needs_netem = pytest.mark.skipif(not HAS_NETEM, reason=MISSING or "this kernel has no netem, which makes delays")


@pytest.fixture(scope="module")
def lab2() -> Iterator[str]:
    with lab(2) as name:
        yield name


def run_on(name: str, folder: Path, *command: str, timeout_s: float = 60) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and report of a command on a lab."""
    report = folder / "report.json"
    status, output = run_command([NETLAB, "run", "--name", name, "--json", str(report), "--", *command], timeout_s)
    return status, output, json.loads(report.read_text())


def interfaces() -> str:
    """The machine's own interfaces, by name and number."""
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def processes(mark: str) -> list[str]:
    """Command lines in which the mark occurs, or whose mounts show it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_text().replace("\0", " ")
            if mark in text or mark in (folder / "mountinfo").read_text():
                found.append(text)
        except OSError:
            continue
    return found


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("up", "up expects --hosts N"),
        ("up --hosts 0", "--hosts: expected a whole number from 1 to 254, got '0'"),
        ("up --hosts 255", "from 1 to 254, got '255'"),
        ("up --hosts two", "from 1 to 254, got 'two'"),
        ("up --hosts 2 --rate 1", "expected a rate such as 100mbit, 2.5gbit or none, got '1'"),
        ("up --hosts 2 --rate 0mbit", "or none, got '0mbit'"),
        ("up --hosts 2 --delay 3", "expected a delay such as 50us, 0.1ms or none, got '3'"),
        ("up --hosts 2 --slots -1", "from 1 to 1024, got '-1'"),
        ("up --hosts 2 --name ../etc", "expected a name of lower-case letters, digits and hyphens, got '../etc'"),
        ("up --hosts 2 --remote-shell telnet", "'telnet'"),
        ("up --hosts 2 -- ls", "up expects nothing after --, got ls"),
        ("run", "run expects -- and a command"),
        ("run --", "run expects -- and a command"),
        ("run --rate 1gbit --slots 2 -- ls", "run expects --slots, --rate only with --hosts"),
        ("shape --rate fast", "got 'fast'"),
        ("kill", "HOST"),
        ("fly", "'fly'"),
    ],
)
def test_bad_use_exits_with_2_and_says_why(arguments: str, message: str) -> None:
    status, output = run_command([NETLAB, *arguments.split()], 10)
    assert status == 2
    assert message in output
    assert output.startswith("launch/netlab: ") and output.count("\n") == 1


def test_help() -> None:
    status, output = run_command([NETLAB, "--help"], 10)
    assert status == 0
    assert output.startswith("usage: launch/netlab")


@needs_lab  # where root may become another user, too
def test_another_user_is_told_to_become_root() -> None:
    become = ["setpriv", "--reuid", "65534", "--clear-groups"]
    status, output = run_command([*become, NETLAB, "status"], 10)
    assert status == 1
    assert "expected root" in output and "sudo" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="netlab asks for root first")
def test_missing_tools_are_named_with_their_packages(tmp_path: Path) -> None:
    for tool in ("env", "python3", "unshare", "nsenter", "hostname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    status, output = run_command([NETLAB, "status"], 10, PATH=str(tmp_path))
    assert status == 1
    assert "expected ip, tc in PATH, found none: install iproute2" in output


# What it builds and leaves

lab_test = [pytest.mark.multiprocess, needs_lab]


class TestOneLab:
    pytestmark = lab_test

    def test_hosts_have_their_own_names_addresses_and_interfaces(self, lab2: str, tmp_path: Path) -> None:
        hosts = "$(cut -d' ' -f1 $NETLAB_HOSTS_FILE)"
        show = f'for host in {hosts}; do ssh $host "hostname; hostname -i; ls /sys/class/net"; done'
        status, output, _ = run_on(lab2, tmp_path, "bash", "-c", f"hostname; pwd; echo $NETLAB_HOSTS; {show}")
        assert status == 0
        expected = [f"{lab2}-1", str(ROOT), f"{lab2}-1:1,{lab2}-2:1"]
        expected += [f"{lab2}-1", "10.77.0.1", "eth0", "lo", f"{lab2}-2", "10.77.0.2", "eth0", "lo"]
        assert output.splitlines()[: len(expected)] == expected

    def test_status_of_the_command_is_its_own(self, lab2: str, tmp_path: Path) -> None:
        assert run_on(lab2, tmp_path, "sh", "-c", "exit 7")[2]["exit_status"] == 7
        assert run_on(lab2, tmp_path, "sh", "-c", "kill -SEGV $$")[0] == 128 + signal.SIGSEGV
        assert run_on(lab2, tmp_path, "no-such-command")[0] == 127

    def test_counts_what_each_host_sent_and_received(self, lab2: str, tmp_path: Path) -> None:
        status, output, report = run_on(
            lab2, tmp_path, PYTHON, "-m", "tests.support.lab_main", "send", f"{lab2}-2", "64"
        )
        assert status == 0, output
        assert set(report) == {"hosts", "elapsed_s", "exit_status"}
        sender, receiver = report["hosts"]
        assert (sender["name"], receiver["name"]) == (f"{lab2}-1", f"{lab2}-2")
        for one, other in ((sender, receiver), (receiver, sender)):
            assert set(one) == {"name", "sent_bytes", "received_bytes"}
            assert one["sent_bytes"] == pytest.approx(other["received_bytes"], rel=0.01)
        assert 64 * 2**20 < sender["sent_bytes"] < 1.1 * 64 * 2**20
        assert receiver["sent_bytes"] < 0.1 * 64 * 2**20
        assert f"{sender['sent_bytes']:,}" in output

    @pytest.mark.parametrize(("rate", "mebibytes"), [("100mbit", 16), ("1gbit", 128), ("10gbit", 1024)])
    def test_rate_is_kept(self, lab2: str, tmp_path: Path, rate: str, mebibytes: int) -> None:
        send = [PYTHON, "-m", "tests.support.lab_main", "send", f"{lab2}-2", str(mebibytes)]
        reached = {}
        for shaped in ("none", rate):
            status, output = run_command([NETLAB, "shape", "--name", lab2, "--rate", shaped], 10)
            assert status == 0, output
            # The best of three: what is on trial is the shaping, not what else this machine has to do.
            reached[shaped] = max(float(run_on(lab2, tmp_path, *send)[1].splitlines()[0]) for _ in range(3))
        payload_mbit_s = {"100mbit": 100, "1gbit": 1000, "10gbit": 10_000}[rate] * 1448 / 1514  # without headers
        most_here = 0.6 * reached["none"]  # of a machine that is busy, or that sends less than 10 Gbit/s
        assert 0.93 * min(payload_mbit_s, most_here) < reached[rate] < 1.02 * payload_mbit_s

    def test_shape_takes_the_limit_away_again(self, lab2: str) -> None:
        for rate in ("1mbit", "none"):
            assert run_command([NETLAB, "shape", "--name", lab2, "--rate", rate], 10)[0] == 0
            shown = run_command([NETLAB, "run", "--name", lab2, "--", "tc", "qdisc", "show", "dev", "eth0"], 20)[1]
            assert ("tbf" in shown) == (rate != "none")
            assert f"rate {rate}" in run_command([NETLAB, "status", "--name", lab2], 10)[1]

    @needs_netem
    def test_delay_is_kept(self, lab2: str, tmp_path: Path) -> None:
        refused = "import socket, time; start_s = time.monotonic(); socket.socket().connect_ex(('{}', 9))"
        refused = f"{refused.format(f'{lab2}-2')}; print(time.monotonic() - start_s)"
        for delay, least_s, most_s in (("30ms", 0.06, 0.2), ("none", 0, 0.02)):
            status, output = run_command([NETLAB, "shape", "--name", lab2, "--delay", delay], 10)
            assert status == 0, output
            there_and_back_s = [float(run_on(lab2, tmp_path, PYTHON, "-c", refused)[1].split()[0]) for _ in range(3)]
            assert least_s <= min(there_and_back_s) < most_s

    @pytest.mark.skipif(HAS_NETEM, reason="this kernel has netem: nothing fails")
    def test_a_delay_that_cannot_be_leaves_the_lab_as_it_was(self, lab2: str) -> None:
        assert run_command([NETLAB, "shape", "--name", lab2, "--rate", "50mbit"], 10)[0] == 0
        try:
            status, output = run_command([NETLAB, "shape", "--name", lab2, "--rate", "1gbit", "--delay", "1ms"], 10)
            assert status == 1 and "could not set a delay (which needs a kernel with netem" in output
            for number in (1, 2):
                show = ["ssh", f"{lab2}-{number}", "tc", "qdisc", "show", "dev", "eth0"]
                assert "rate 50Mbit" in run_command([NETLAB, "run", "--name", lab2, "--", *show], 20)[1]
            assert "rate 50mbit, delay none" in run_command([NETLAB, "status", "--name", lab2], 10)[1]
        finally:
            run_command([NETLAB, "shape", "--name", lab2, "--rate", "none"], 10)

    def test_one_command_at_a_time(self, lab2: str) -> None:
        nested = [NETLAB, "run", "--name", lab2, "--", "true"]
        status, output = run_command([NETLAB, "run", "--name", lab2, "--", "sh", "-c", " ".join(nested)], 20)
        assert status == 1
        assert f"lab {lab2} is running a command" in output

    def test_what_a_command_leaves_behind_is_ended(self, lab2: str) -> None:
        leave = f"setsid sleep 4242 & ssh {lab2}-2 'setsid sleep 4242 >/dev/null 2>&1 </dev/null & exit'"
        status, output = run_command([NETLAB, "run", "--name", lab2, "--", "sh", "-c", leave], 30)
        assert status == 0, output
        assert "ended 2 processes that a command left behind" in output
        assert not processes("sleep 4242")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_the_command_and_the_report_is_written(
        self, lab2: str, tmp_path: Path, number: signal.Signals
    ) -> None:
        report = tmp_path / "report.json"
        job = ["sh", "-c", f"touch {tmp_path}/started; exec sleep 4242"]
        command = [NETLAB, "run", "--name", lab2, "--json", str(report), "--", *job]
        with started(command, start_new_session=True) as running:
            wait_until((tmp_path / "started").exists)
            running.send_signal(number)
            assert running.wait(30) == 128 + number
        assert json.loads(report.read_text())["exit_status"] == 128 + number
        assert not processes("sleep 4242")

    def test_after_a_killed_run_the_lab_can_be_used(self, lab2: str, tmp_path: Path) -> None:
        job = ["sh", "-c", f"touch {tmp_path}/started; exec sleep 4242"]
        with started([NETLAB, "run", "--name", lab2, "--", *job]) as running:
            wait_until((tmp_path / "started").exists)
            running.kill()
        status, output, _ = run_on(lab2, tmp_path, "hostname")
        assert (status, output.splitlines()[1]) == (0, f"{lab2}-1"), output
        assert not processes("sleep 4242")

    def test_unknown_names_list_the_known(self, lab2: str) -> None:
        assert f"there is {lab2}" in run_command([NETLAB, "status", "--name", "nowhere"], 10)[1]
        status, output = run_command([NETLAB, "kill", "--name", lab2, "node9"], 10)
        assert status == 1
        assert f"expected one of the hosts {lab2}-1, {lab2}-2, got 'node9'" in output


class TestComingAndGoing:
    pytestmark = lab_test

    def test_nothing_stays_and_nothing_of_the_machine_changes(self) -> None:
        before = interfaces()
        with lab(3, "--rate", "1gbit") as name:
            assert interfaces() == before
            assert len(processes(f"/netlab/{name}/")) >= 4
        assert interfaces() == before
        assert not processes(f"/netlab/{name}/")
        assert not Path("/run/netlab", name).exists()
        assert run_command([NETLAB, "status", "--name", name], 10)[0] == 1
        assert run_command([NETLAB, "down", "--name", name], 10)[0] == 0, "a second time is as well"

    def test_a_lab_for_one_command(self, tmp_path: Path) -> None:
        name = f"test-{os.getpid()}-once"
        show = ["sh", "-c", "cat $NETLAB_HOSTS_FILE; exit 3"]
        status, output = run_command([NETLAB, "run", "--name", name, "--hosts", "3", "--slots", "2", "--", *show], 30)
        assert status == 3
        assert output.splitlines()[:3] == [f"{name}-{number} slots=2" for number in (1, 2, 3)]
        assert not processes(f"/netlab/{name}/") and not Path("/run/netlab", name).exists()

    def test_a_lab_removed_under_a_command_is_reported(self, tmp_path: Path) -> None:
        report = tmp_path / "report.json"
        with lab(2) as name:
            job = ["sh", "-c", f"touch {tmp_path}/started; exec sleep 4242"]
            command = [NETLAB, "run", "--name", name, "--json", str(report), "--", *job]
            with started(command, stderr=subprocess.PIPE) as running:
                wait_until((tmp_path / "started").exists)
                assert run_command([NETLAB, "down", "--name", name], 10)[0] == 0
                _, output = running.communicate(timeout=30)
        assert running.returncode == 128 + signal.SIGKILL
        assert f"lab {name} was removed while the command ran" in output
        assert json.loads(report.read_text())["exit_status"] == running.returncode

    @pytest.mark.parametrize("after_s", [0.0, 0.1, 0.2, 0.3])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_an_interrupted_up_can_be_repeated(self, number: signal.Signals, after_s: float) -> None:
        name = f"test-{os.getpid()}-cut"
        up = [NETLAB, "up", "--name", name, "--hosts", "8", "--remote-shell", "agent"]
        with started(up, stderr=subprocess.DEVNULL, start_new_session=True) as starting:
            time.sleep(after_s)
            starting.send_signal(number)
            starting.wait(30)
        ended_by_us = starting.returncode != 0
        if number == signal.SIGINT and ended_by_us:
            wait_until(lambda: not processes(f"/netlab/{name}/"))
        assert run_command([*up[:5], "2"], 30)[0] == 0
        assert run_command([NETLAB, "run", "--name", name, "--", "ssh", f"{name}-2", "true"], 30)[0] == 0
        assert run_command([NETLAB, "down", "--name", name], 30)[0] == 0
        assert not processes(f"/netlab/{name}/")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_to_a_finished_up_comes_too_late(self, number: signal.Signals) -> None:
        name = f"test-{os.getpid()}-late"
        up = [NETLAB, "up", "--name", name, "--hosts", "1", "--remote-shell", "agent"]
        with started(up, stderr=subprocess.DEVNULL, start_new_session=True) as starting:
            while starting.poll() is None:  # as often as can be: its last moments are the dangerous ones
                if Path("/run/netlab", name, "lab.json").exists():
                    starting.send_signal(number)
        status, _ = run_command([NETLAB, "run", "--name", name, "--", "hostname"], 30)
        assert run_command([NETLAB, "down", "--name", name], 30)[0] == 0
        assert (starting.returncode, status) == (0, 0)

    def test_a_lab_whose_holders_were_killed_says_so_and_goes(self) -> None:
        with lab(2) as name:
            hosts = json.loads(Path("/run/netlab", name, "lab.json").read_text())["hosts"]
            os.kill(hosts[1]["pids"][0], signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{hosts[1]['pids'][0]}/ns/net").exists())
            status, output = run_command([NETLAB, "run", "--name", name, "--", "true"], 10)
            assert status == 1
            assert f"{name}-2: build the lab anew" in output
        assert not processes(f"/netlab/{name}/")


# Jobs across hosts


class TestJobs:
    pytestmark = lab_test

    @pytest.mark.parametrize("shell", SHELLS)
    @pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
    def test_ranks_start_on_different_hosts(self, tmp_path: Path, shell: str, launcher: str) -> None:
        with lab(3, "--remote-shell", shell) as name:
            job = ["sh", "-c", f"echo $OMPI_COMM_WORLD_RANK$HOROVOD_RANK$RANK >{tmp_path}/$(hostname)"]
            status, output = run_command([*on_lab(name, LAUNCHERS[launcher]), "--", *job], 60)
            assert status == 0, output
            ranks = {file.name: file.read_text().strip()[:1] for file in tmp_path.iterdir()}
            assert ranks == {f"{name}-1": "0", f"{name}-2": "1", f"{name}-3": "2"}

    @pytest.mark.parametrize("shell", SHELLS)
    @pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
    def test_a_killed_host_ends_the_job_and_the_reports_are_whole(
        self, tmp_path: Path, shell: str, launcher: str
    ) -> None:
        report = tmp_path / "report.json"
        with lab(3, "--remote-shell", shell) as name:
            command = on_lab(name, LAUNCHERS[launcher])
            command[4:4] = ["--json", str(report)]
            transport = launcher.partition("-")[0]
            command += ["--", PYTHON, "-m", "tests.support.lab_main", "exchange", transport, str(tmp_path)]
            ledgers = [tmp_path / f"{name}-{number}.jsonl" for number in (1, 2, 3)]
            with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
                wait_until(lambda: all(file.exists() for file in ledgers), FIRST_STEP_LIMIT_S)
                time.sleep(1)
                assert run_command([NETLAB, "kill", "--name", name, f"{name}-2"], 20)[0] == 0
                killed_s = time.monotonic()
                output, _ = job.communicate(timeout=HOST_END_LIMIT_S + 30)
                elapsed_s = time.monotonic() - killed_s
        assert elapsed_s < HOST_END_LIMIT_S, output
        assert job.returncode not in (0, None), output
        said = "\n".join(line for line in output.splitlines() if not line.startswith("launch/netlab: "))
        assert ("Process name: 1\n" if launcher == "horovod-gloo" else f"{name}-2") in said, output
        figures = json.loads(report.read_text())
        assert figures["exit_status"] == job.returncode
        assert all(host["sent_bytes"] > 10_000 for host in figures["hosts"])
        for ledger in ledgers:
            records = [json.loads(line) for line in ledger.read_text().splitlines()]
            assert {"sketch", "exact"} <= {record["phase"] for record in records}
