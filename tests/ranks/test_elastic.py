"""Elastic jobs: ranks that join and leave, and what becomes of residuals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.harness import ROOT, child_environment, run_command

HOSTS = "localhost:2\n"
# torch 2.13 remembers where the first ranks' store is, and does not tell a host that joins, unless stores are separate.
JOINABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["", "shared", "rounds"])
@pytest.mark.daily
def test_a_rank_joins_and_is_lost_over_horovod(tmp_path: Path, how: str) -> None:
    """2, 3, 2 ranks: residuals are kept and rescaled, a new rank begins with zeros, all ranks stay equal.

    Shared, nothing is lost with a rank but what it made since the commit. In rounds of three steps every second commit
    comes within one.
    """
    hosts, discover = tmp_path / "hosts", tmp_path / "discover.sh"
    hosts.write_text(HOSTS)
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(0o755)
    launcher = ["bash", "-c", 'source launch/env.sh && exec "$@"', "bash", "env", "OMP_NUM_THREADS=1", "horovodrun"]
    ranks = ["--gloo", "--network-interfaces", "lo", "-np", "2", "--min-np", "2", "--max-np", "3"]
    job = [sys.executable, "-m", "tests.support.elastic_main", str(hosts), how]
    command = [*launcher, *ranks, "--host-discovery-script", str(discover), *job]
    _, output = run_command(command, timeout_s=150)
    for rank in (0, 1):
        assert f"rank {rank} of 3 kept its residual, times 1.5000" in output, output
        assert f"rank {rank} ends after [2, 3, 2]" in output, output
    if how == "shared":
        told = "1 of 3 ranks are gone. All go on from the mean of all residuals at step"
        assert told in " ".join(output.replace("[0]<stderr>:", "").split()), output
        norms = re.findall(r"rank \d goes on with all residuals' mean of norm (\S+)", output)
        assert len(norms) == 2 and norms[0] == norms[1] and float(norms[0]) > 0
        return
    for rank in (0, 1):
        assert f"rank {rank} of 2 kept its residual, times 0.6667" in output, output
    told = (
        r"1 of 3 ranks are gone, and with them what they had not sent: residuals of norm (\S+) .* together was (\S+)\. "
    )
    lost, everyones = map(float, re.search(told, output).groups())  # type: ignore[union-attr]
    assert 0 < lost < everyones
    assert f"the lost rank kept a residual of norm {lost:.3g}" in output


def test_two_levels_are_refused() -> None:
    elastic = pytest.importorskip("hvd_sketch.elastic")
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Leave levels=2 out of the arguments of SketchState"):
        elastic.SketchState(model, torch.optim.SGD(model.parameters()), arguments={"levels": 2})


class Agent:
    """A torchrun of one host's rank, which may be killed like a host."""

    def __init__(self, endpoint: str, job: list[str], is_first: bool = False) -> None:
        quick = f"is_host={int(is_first)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4"
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "elastic", "--rdzv-conf", quick]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        options = [*meet, "--max-restarts", "3", "--monitor-interval", "0.2", "-m", "tests.support.restarted_main"]
        self._process = subprocess.Popen(
            [*torchrun, *options, *job],
            cwd=ROOT,
            env=child_environment() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", JOINABLE: "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill(self) -> None:
        """The agent and its rank, which has a session of its own."""
        ranks = subprocess.run(["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True, check=False)
        for pid in (self._process.pid, *map(int, ranks.stdout.split())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def end(self, timeout_s: float) -> str:
        """Its output, once it has ended by itself."""
        try:
            return self._process.communicate(timeout=timeout_s)[0]
        finally:
            self.kill()


def wait_for(told: Path, ranks: int, steps: int, timeout_s: float = 60) -> tuple[int, int]:
    """Until the job has taken some steps with so many ranks; where it began, and where it is."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        lines = told.read_text().splitlines() if told.exists() else []
        size, begun, step = map(int, lines[-1].split()) if lines else (0, 0, 0)
        if size == ranks and step - begun >= steps:
            return begun, step
        time.sleep(0.1)
    raise AssertionError(f"{ranks} ranks did not take {steps} steps in {timeout_s} s: {lines[-3:]}")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """A host is lost, and one joins: the others repeat at most the step that was not saved yet."""
    told = tmp_path / "told"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    job = [str(tmp_path / "saved"), str(told)]
    agents = [Agent(endpoint, job, is_first) for is_first in (True, False)]
    try:
        _, lost_at = wait_for(told, 2, 3)
        agents[1].kill()
        begun, alone_at = wait_for(told, 1, 3)
        assert begun >= lost_at - 1
        agents.append(Agent(endpoint, job))
        begun, _ = wait_for(told, 2, 3)
        assert begun >= alone_at - 1
        told.with_suffix(".end").touch()
        assert "rank 0 of 2 ends" in agents[0].end(timeout_s=30)
    finally:
        for agent in agents:
            agent.kill()
