"""What `ssh HOST` reaches in a lab: a real sshd on each host, or an agent that enters the host."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from netlab_lib.lab import Host, Lab, LabError, step

START_LIMIT_S = 10
WITHOUT_SSHD = "--remote-shell agent goes without sshd"
SSH_OPTIONS_WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"
LOGIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
MaxStartups 100
"""
SSH_CONFIG = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def start_remote_shell(lab: Lab) -> None:
    """Put an `ssh` into the lab's bin that reaches its hosts: the real one, or :func:`remote_shell`."""
    ssh = lab.folder / "bin/ssh"
    ssh.parent.mkdir()
    if lab.remote_shell == "agent":
        netlab = shlex.join([sys.executable, str(Path(__file__).resolve().parent.parent / "netlab")])
        write_script(ssh, f"exec {netlab} ssh --name {lab.name} --")
        return
    make_ssh_files(lab.folder)
    write_script(ssh, f"exec {shutil.which('ssh')} -F {lab.folder}/ssh_config")
    for host in lab.hosts:
        start_sshd(lab, host)
        reach = lab.hosts[0].inside(str(ssh), "-o", f"ConnectTimeout={START_LIMIT_S}", host.name, "true")
        step(f"reach {host.name} by ssh ({WITHOUT_SSHD})", reach)


def write_script(path: Path, line: str) -> None:
    path.write_text(f'#!/bin/sh\n{line} "$@"\n')
    path.chmod(0o755)


def make_ssh_files(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        step("make keys for ssh", command)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd locks itself in; its package makes it at boot


def start_sshd(lab: Lab, host: Host) -> None:
    """An sshd on one host, once it listens."""
    command = host.inside(str(find_sshd()), "-D", "-e", "-f", str(lab.folder / "sshd_config"))
    log = lab.folder / f"{host.name}.sshd.log"
    with log.open("w") as file:
        sshd = subprocess.Popen(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    deadline_s = time.monotonic() + START_LIMIT_S
    while "Server listening" not in log.read_text():
        if sshd.poll() is not None or time.monotonic() > deadline_s:
            raise LabError(
                f"could not start sshd on {host.name} ({WITHOUT_SSHD}): "
                f"'{shlex.join(command)}' said: {log.read_text().strip()}"
            )
        time.sleep(0.01)
    host.pids.append(sshd.pid)


def find_sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:{LOGIN_PATH}")


def remote_shell(lab: Lab, arguments: list[str]) -> None:
    """Become a command on a host as ssh would start it: in a login environment, the words joined for a shell."""
    target, command = split_ssh_arguments(arguments)
    user = pwd.getpwuid(os.getuid())
    shell = user.pw_shell or "/bin/sh"
    environment = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": shell}
    line = lab.host(target.rpartition("@")[2]).inside("env", f"--chdir={user.pw_dir}", shell)
    line += ["-c", command] if command else ["-l"]
    os.execvpe(line[0], line, environment | {"PATH": LOGIN_PATH})


def split_ssh_arguments(arguments: list[str]) -> tuple[str, str]:
    """Host and command of an ssh command line. ssh takes options before and after the host, and so do its users."""
    words, host = list(arguments), ""
    while words:
        word = words[0]
        if word == "--":
            del words[0]
        elif len(word) > 1 and word[0] == "-":
            del words[: 2 if len(word) == 2 and word[1] in SSH_OPTIONS_WITH_VALUE else 1]
        elif not host:
            host = words.pop(0)
        else:
            break
    return host, " ".join(words)
