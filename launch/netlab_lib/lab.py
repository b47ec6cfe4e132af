"""A lab: what it is made of, where it is kept, and how a step of its making is run."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = Path("/run/netlab")
INTERFACE = "eth0"
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a command to end
NEEDED = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "hostname": "hostname"}


class LabError(Exception):
    """What was asked for did not work; the message says which step, and what the step said."""


@dataclass
class Host:
    """A network, a hostname and a mount namespace.

    Attributes:
        pids: the processes that belong to the host itself: the one that holds its namespaces, then its sshd.
    """

    name: str
    address: str
    pids: list[int]

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return ["nsenter", "--target", str(self.pids[0]), "--net", "--uts", "--mount", "--", *command]


@dataclass
class Lab:
    """Hosts, each with a cable from its eth0 to the switch: a bridge in a namespace of its own.

    Nothing of the machine's own network is touched, labs cannot meet, and all is gone with the processes that hold
    the namespaces. What lies on disk is one folder, until the lab is removed.
    """

    name: str
    slots: int
    remote_shell: str
    rate: str
    delay: str
    switch: Host
    hosts: list[Host]

    @property
    def folder(self) -> Path:
        return STATE / self.name

    def save(self) -> None:
        write_whole(self.folder / "lab.json", json.dumps(asdict(self)))

    @classmethod
    def load(cls, name: str) -> Lab:
        try:
            saved = json.loads((STATE / name / "lab.json").read_text())
        except FileNotFoundError:
            others = ", ".join(sorted(path.parent.name for path in STATE.glob("*/lab.json")))
            raise LabError(
                f"no lab named {name} is up{f' (there is {others})' if others else ''}: "
                f"make it with 'launch/netlab up --name {name} --hosts 4'"
            ) from None
        hosts = [Host(**host) for host in saved["hosts"]]
        return cls(**saved | {"hosts": hosts, "switch": Host(**saved["switch"])})

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if name in (host.name, host.address):
                return host
        raise LabError(f"expected one of the hosts {', '.join(host.name for host in self.hosts)}, got '{name}'")


@contextmanager
def reserved(name: str) -> Iterator[None]:
    """Keeps others from running commands in a lab, whose bytes would be counted too, and from building it anew."""
    lock = os.open(STATE / name, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise LabError(
            f"lab {name} is running a command: wait for its end, stop it with 'launch/netlab down --name {name}', "
            "or use another --name"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def step(what: str, command: list[str]) -> None:
    """Run a command that does ``what``; a failure names both and shows what the command said."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise LabError(f"could not {what}: '{shlex.join(command)}' said: {said}")


def need_root_and_tools() -> None:
    if os.geteuid() != 0:
        raise LabError(
            f"expected root, because only root may make network namespaces, got user {os.geteuid()}: use sudo"
        )
    missing = {tool: package for tool, package in NEEDED.items() if not shutil.which(tool)}
    if missing:
        packages = ", ".join(sorted(set(missing.values())))
        raise LabError(f"expected {', '.join(missing)} in PATH, found none: install {packages}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def note(text: str) -> None:
    print(f"launch/netlab: {text}", file=sys.stderr)
