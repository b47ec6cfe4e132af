"""What ``hvd-sketch doctor --bundle`` writes tells nobody whose machine it is, and where."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from hvd_sketch.commands import bundle
from hvd_sketch.commands.finding import Finding

HOSTS = ["someone@node17.example.org", "box", "10.1.2.3"]
TOLD = {
    "no such file: /home/someone/work/train.py on box": "no such file: <path> on <host>",
    "kept in /scratch": "kept in <path>",
    "File '/home/some one/my work/a.py', line 3": "File '<path>', line 3",
    "PATH=/opt/mpi/bin:/usr/bin (/opt/x), file:///home/someone.": "PATH=<path>:<path> (<path>), file://<path>.",
    "someone@node17: no route to node17.example.org": "<user>@<host>: no route to <host>",
    "[node99:12345] PMIX ERROR, box:29500, box.ib.example.org": "[<host>:12345] PMIX ERROR, <host>:29500, <host>",
    "login.example.org, node03 and node04.cluster, rack-7": "<host>, <host> and <host>, <host>",
    "  host      : other.site.net": "  host      : <host>",
    "rank 0 with PID 7 on node strange-1 exited": "rank 0 with PID 7 on node <host> exited",
    "10.1.2.3:29500, fe80::1ff:fe23:4567:890a%eth0, ::1": "<address>:29500, <address>%eth0, <address>",
    "asked by jdoe for jdoes": "asked by <user> for jdoes",
}
KEPT = "torch 2.13.0, and/or 12 MB/s at 20:03:57, nodes agree, boxes, see https://pytorch.org/docs/stable/elastic"


def test_names_paths_and_addresses_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "jdoe")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[01-04,17],rack-[7-9]")
    for told, hidden in TOLD.items():
        assert bundle.anonymous(told, HOSTS) == hidden
    assert bundle.anonymous(KEPT, HOSTS) == KEPT


def test_folders_of_this_process_may_have_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my kernels"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    assert bundle.anonymous(f"compiled, in {folder}/of numba") == "compiled, in <path> numba"


def test_a_bundle_has_the_last_lines_of_what_failed(tmp_path: Path) -> None:
    told = f"/home/x/train.py on {socket.gethostname()} by {getpass.getuser()}@box"
    found = [
        Finding("host box", "wrong", told, "mend /opt/mpi/bin", "last words\nof 10.1.2.3"),
        Finding("disk", "ok", "9"),
    ]
    bundle.write_bundle(found, tmp_path / "bundle", names=False, hosts=HOSTS)
    assert (tmp_path / "bundle").read_text().splitlines() == [
        "wrong host <host>: <path> on <host> by <user>@<host> -- mend <path>",
        "      | last words",
        "      | of <address>",
        "ok    disk: 9",
    ]
    bundle.write_bundle(found, tmp_path / "bundle", names=True, hosts=HOSTS)
    assert told in (tmp_path / "bundle").read_text()
