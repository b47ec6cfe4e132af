"""Elastic jobs: ranks that join and leave, and what becomes of residuals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.harness import run_command

HOSTS = "localhost:2\n"


@pytest.mark.multiprocess
def test_a_rank_joins_and_is_lost_over_horovod(tmp_path: Path) -> None:
    """2, 3, 2 ranks: residuals are kept and rescaled, a new rank begins with zeros, all ranks stay equal."""
    hosts, discover = tmp_path / "hosts", tmp_path / "discover.sh"
    hosts.write_text(HOSTS)
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(0o755)
    launcher = ["bash", "-c", 'source launch/env.sh && exec "$@"', "bash", "env", "OMP_NUM_THREADS=1", "horovodrun"]
    ranks = ["--gloo", "--network-interfaces", "lo", "-np", "2", "--min-np", "2", "--max-np", "3"]
    job = [sys.executable, "-m", "tests.support.elastic_main", str(hosts)]
    command = [*launcher, *ranks, "--host-discovery-script", str(discover), *job]
    _, output = run_command(command, timeout_s=150)
    for rank in (0, 1):
        assert f"rank {rank} of 3 kept its residual, times 1.5000" in output, output
        assert f"rank {rank} of 2 kept its residual, times 0.6667" in output, output
        assert f"rank {rank} ends after [2, 3, 2]" in output, output
    assert "1 of 3 ranks are gone, and with them what they had not sent" in output
