"""Run a function on several ranks, as threads or under one of the launchers, and collect what it returns.

The function is named ``"module:function"``; it takes a transport and keyword arguments that JSON can carry, and
returns anything ``torch.save`` can write. Every launch has a time limit and fails loudly when it is reached.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from hvd_sketch.transport import run_local

ROOT = Path(__file__).parents[2]
END_LIMIT_S = 30
FIRST_STEP_LIMIT_S = 180  # the kernels may have to be compiled first
LAUNCHERS = {
    "torch": ["launch/torchrun.sh"],
    "mpi": ["launch/mpirun.sh"],
    "horovod-gloo": ["launch/horovodrun.sh", "--gloo"],
    "horovod-mpi": ["launch/horovodrun.sh", "--mpi"],
}


def launch(
    kind: str, ranks: int, target: str, timeout_s: float = 120, lab: str | None = None, **kwargs: Any
) -> list[Any]:
    """Run ``target`` on ``ranks`` ranks of ``kind`` ("local" or a key of LAUNCHERS): the results in rank order.

    With the name of a ``lab`` (see labs.py) the ranks run on its hosts, not on this machine.
    """
    if kind == "local":
        return run_local(ranks, partial(resolve(target), **kwargs), timeout_s)
    with tempfile.TemporaryDirectory() as folder:
        rank_main = [sys.executable, "-m", "tests.support.harness", kind, target, json.dumps(kwargs), folder]
        launcher = on_lab(lab, LAUNCHERS[kind]) if lab else LAUNCHERS[kind]
        status, output = run_command([*launcher, "-n", str(ranks), "--", *rank_main], timeout_s)
        assert status == 0, f"{kind} with {ranks} ranks ended with status {status}:\n{output}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def on_lab(lab: str, launcher: list[str]) -> list[str]:
    """The launcher's command line, run on the first host of a lab for ranks on all of them."""
    hosts = ["--hosts", f"/run/netlab/{lab}/hosts", "--interface", "eth0"]
    return ["launch/netlab", "run", "--name", lab, "--", *launcher, *hosts]


def run_command(command: list[str], timeout_s: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command from the checkout's root; its whole process group dies at the limit.

    What it has started in other groups, as horovodrun does, may still hold its output: that is not waited for.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired as held:
            output = f"{held.output!r}, and whatever its other processes, which still run, have written"
        raise AssertionError(f"{' '.join(command)} did not end within {timeout_s} s:\n{output}") from None
    return process.returncode, output


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command running from the checkout's root; it is ended with the block, however that ends."""
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(reached: Callable[[], object], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline_s, f"not reached within {timeout_s} s"
        time.sleep(0.02)


def child_environment() -> dict[str, str]:
    return os.environ | {"HVD_SKETCH_VENV": sys.prefix, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}


def resolve(target: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names."""
    module, function = target.split(":")
    return getattr(import_module(module), function)


def _rank_main(kind: str, target: str, kwargs: str, folder: str) -> None:
    from hvd_sketch.transport import resolve_transport

    transport = resolve_transport(kind.partition("-")[0])
    result = resolve(target)(transport, **json.loads(kwargs))
    torch.save(result, Path(folder) / f"{transport.rank}.pt")
    transport.barrier()


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
