"""The text file for a report of a fault, without what tells whose machine it is and where."""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hvd_sketch.commands.finding import Finding
from hvd_sketch.files import replaced

# An address of the web is none, "file:///home" is one. A path in quotes may have spaces.
PATH = re.compile(r"(?:(?<=//)|(?<![\w/]))/(?!/)[^\s'\"`:;<>|]*[^\s'\"`:;<>|.,()\[\]{}]")
QUOTED_PATH = re.compile(r"(['\"])/[^'\"\n]*\1")
ACCOUNT = re.compile(r"[\w.+-]+@[\w.-]+")
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)|(?<![\w:.])(?:[\dA-Fa-f]*:){2,}[\dA-Fa-f]+")
PROCESS = re.compile(r"\[[\w.-]+:(\d+)\]")  # as Open MPI's processes call themselves
NAMING = re.compile(r"(?m)^(\s*(?:\[\w+\]:?)?\s*host\s*:\s*)\S+|(\bon (?:node|host) )[\w-]+(?:\.[\w-]+)*")
HOST_VARIABLES = ("HOSTNAME", "MASTER_ADDR", "SLURMD_NODENAME", "SLURM_SUBMIT_HOST", "HVD_SKETCH_HOST")
NODE_LISTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")  # node[01-04],login
USER_VARIABLES = ("USER", "LOGNAME", "SUDO_USER")
OF_EVERYBODY = {"", "root", "localhost", "localdomain"}


def write_bundle(found: Sequence[Finding], file: Path, names: bool, hosts: Sequence[str] = ()) -> None:
    """One text file; unless ``names``, :func:`anonymous`.

    Raises:
        OSError: the file could not be written.
    """
    lines = []
    for finding in found:
        lines.append(f"{finding.state:5} {finding.name}: {finding.told}{' -- ' * bool(finding.mend)}{finding.mend}\n")
        lines += [f"      | {line}\n" for line in finding.details.splitlines()]
    text = "".join(lines)
    with replaced(file) as draft:
        draft.write_text(text if names else anonymous(text, hosts), encoding="utf-8")


def anonymous(text: str, hosts: Sequence[str] = ()) -> str:
    """A text without absolute paths, users, hosts and network addresses.

    Hosts are this one, those given, those of a Slurm job, and what stands where launchers print a host's name.
    """
    for folder in sorted(_folders_with_spaces(), key=len, reverse=True):
        text = text.replace(folder, "/_")
    text = QUOTED_PATH.sub(r"\1<path>\1", text)
    text = PATH.sub("<path>", text)
    text = ACCOUNT.sub("<user>@<host>", text)
    text = PROCESS.sub(r"[<host>:\1]", text)
    text = NAMING.sub(lambda found: f"{found[1] or found[2]}<host>", text)
    text = _words({*_names(hosts), *_node_patterns()}).sub("<host>", text)
    text = ADDRESS.sub(_hidden, text)
    return _words({re.escape(name) for name in _users()}).sub("<user>", text)


def _folders_with_spaces() -> set[str]:
    """Of this process's environment: nothing else tells where such a path ends."""
    lists = [*os.environ.values(), *sys.path, sys.prefix, sys.executable, os.getcwd()]
    folders = {part for value in lists for part in value.split(os.pathsep)}
    return {folder for folder in folders if folder.startswith("/") and " " in folder}


def _names(hosts: Sequence[str]) -> Iterator[str]:
    """Patterns of hosts: full names, their first labels with any domain behind them, and all of a domain."""
    known = [socket.gethostname(), socket.getfqdn(), *(os.environ.get(name, "") for name in HOST_VARIABLES)]
    for name in [*known, *(host.rpartition("@")[2] for host in hosts)]:
        label, _, domain = name.partition(".")
        if label in OF_EVERYBODY or _is_address(name):
            continue
        yield re.escape(label) + r"(?:\.[\w-]+)*"
        if "." in domain:
            yield r"[\w-]+(?:\.[\w-]+)*\." + re.escape(domain)


def _node_patterns() -> Iterator[str]:
    """Patterns of a Slurm job's nodes, from ``node[01-04,07],login``."""
    for name in NODE_LISTS:
        for group in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", os.environ.get(name, "")):
            yield r"\d+".join(map(re.escape, re.split(r"\[[^\]]*\]", group))) + r"(?:\.[\w-]+)*"


def _users() -> set[str]:
    names = {os.environ.get(name, "") for name in USER_VARIABLES} | {Path(os.path.expanduser("~")).name}
    with suppress(KeyError, OSError):  # a number without a name, as in some containers
        names.add(getpass.getuser())
    return names - OF_EVERYBODY


def _words(patterns: Collection[str]) -> re.Pattern[str]:
    """Whole words that match one of some patterns, the longest first."""
    either = "|".join(sorted(patterns, key=len, reverse=True)) or r"(?!)"
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)


def _hidden(found: re.Match[str]) -> str:
    return "<address>" if _is_address(found[0]) else found[0]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
