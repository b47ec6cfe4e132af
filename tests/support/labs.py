"""Labs for tests: several hosts on this machine, where it allows them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.harness import run_command

# What launch/netlab builds on, tried without it: a fault of its own must not look like a machine without namespaces.
PROBE = """
ip link add probe-switch type bridge
ip link add probe0 type veth peer name probe1
tc qdisc add dev probe0 root tbf rate 1mbit burst 10kb limit 10kb
mount -t sysfs sysfs /sys
"""


def _what_is_missing() -> str:
    if os.geteuid() != 0:
        return "labs need root"
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "hostname") if not shutil.which(tool)]
    if missing:
        return f"labs need {', '.join(missing)}"
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", PROBE]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no labs on this machine: {probe.stderr.strip()}" if probe.returncode else ""


MISSING = _what_is_missing()
needs_lab = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@contextmanager
def lab(hosts: int, *options: str) -> Iterator[str]:
    """The name of a lab that is there while inside, and that no other run of the tests uses."""
    name = f"test-{os.getpid()}"
    status, output = run_command(["launch/netlab", "up", "--name", name, "--hosts", str(hosts), *options], 60)
    assert status == 0, output
    try:
        yield name
    finally:
        status, output = run_command(["launch/netlab", "down", "--name", name], 60)
        assert status == 0, output
