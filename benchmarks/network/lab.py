"""The emulated network, driven through launch/netlab, and ranks on its hosts."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.network.records import Record, Records
from hvd_sketch import units
from hvd_sketch.transport import Transport, resolve_transport

ROOT = Path(__file__).resolve().parents[2]
NETLAB = str(ROOT / "launch/netlab")
LAUNCHERS = {
    "mpi": ["launch/mpirun.sh"],
    "torch": ["launch/torchrun.sh"],
    "horovod": ["launch/horovodrun.sh"],
    "horovod-mpi": ["launch/horovodrun.sh", "--mpi"],
}  # by transport, and what it runs over
UNSHAPED = "none"
RATE = r"(?!0+(\.0*)?[kmg])\d+(\.\d+)?[kmg]bit"


class LabFailed(Exception):
    """The emulated network, or the ranks on it, ended with an error, which stands above."""


@contextmanager
def lab(hosts: int, rate: str = UNSHAPED) -> Iterator[str]:
    """The name of a network of so many hosts that is there while inside, and nobody else's."""
    name = f"bench-{os.getpid()}"
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the network goes, too
    try:
        _netlab("up", "--name", name, "--hosts", str(hosts), "--rate", rate)
        yield name
    finally:
        _netlab("down", "--name", name)


def shape_together(transport: Transport, name: str, rate: str) -> None:
    """Give the network that the ranks are on another rate, while it is idle. Collective."""
    transport.barrier()
    if transport.rank == 0:
        _netlab("shape", "--name", name, "--rate", rate)
    transport.barrier()


def run_pending(
    module: str, hosts: int, pending: Mapping[str, Sequence[Any]], records: Records, settings: Record
) -> None:
    """Run ``python -m module transport settings`` on hosts of its own, over each transport with something pending.

    Raises:
        LabFailed: it did not end well on all hosts.
    """
    if not any(pending.values()):
        return
    with lab(hosts) as name:
        common = {"lab": name, "records": str(records.path.absolute())} | settings
        where = ["--hosts", f"/run/netlab/{name}/hosts", "--interface", "eth0", "--threads", "1"]
        for transport, wanted in pending.items():
            if wanted:
                ranks = [sys.executable, "-m", module, transport, json.dumps(common | {"pending": wanted})]
                script, *options = LAUNCHERS[transport]
                environment = {"HVD_SKETCH_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
                _netlab("run", "--name", name, "--", str(ROOT / script), *options, *where, "--", *ranks, **environment)


def transport_on_host(name: str) -> Transport:
    """That of a rank which :func:`run_pending` started. Communication: collective, all ranks."""
    return resolve_transport(name.partition("-")[0])


def status_of(measure: Callable[[], None], records: Records) -> int:
    """The exit status of a command that measures; what it measured before an end is in its records."""
    try:
        measure()
    except LabFailed as error:
        print(f"{error}; the records up to then are in {records.path}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def network_parser(
    about: str,
    name: str,
    methods: Sequence[str],
    rates: Sequence[str],
    plot: str = "",
    choices: Iterable[str] = METHODS,
) -> argparse.ArgumentParser:
    """With the arguments of all benchmarks over a network; ``plot`` says of what there is one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.network.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = "of the network"
    usual = [transport for transport in LAUNCHERS if transport != "horovod-mpi"]
    parser.add_argument("--rates", type=rate_type, default=list(rates), nargs="+", metavar="RATE", help=told)
    parser.add_argument("--methods", choices=list(choices), default=list(methods), nargs="+", metavar="METHOD")
    parser.add_argument("--transports", choices=LAUNCHERS, default=usual, nargs="+", metavar="TRANSPORT")
    told = "records (default: %(default)s)"
    parser.add_argument("--json", type=file_type, default=Path(f"{name}.json"), help=told)
    if plot:
        parser.add_argument("--plot", type=file_type, metavar="FILE", help=f"PNG of {plot}")
        parser.add_argument("--from-records", action="store_true", help="measure nothing: show the records there are")
    return parser


def rate_type(text: str) -> str:
    """A rate of the network among a command's arguments."""
    if text != UNSHAPED and not re.fullmatch(RATE, text):
        raise argparse.ArgumentTypeError(f"expected a rate such as 100mbit, 2.5gbit or none, got '{text}'")
    return text


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from ``least`` on, which may be written as 25e6."""

    def check(text: str) -> int:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (number >= least and number == int(number)):
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got '{text}'")
        return int(number)

    return check


def file_type(text: str) -> Path:
    """A file that can be written, among a command's arguments."""
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written to, got '{text}'")
    return path


def bits_per_s(rate: str) -> float:
    """Of a rate as launch/netlab takes it; infinite for "none"."""
    return float("inf") if rate == UNSHAPED else units.bits_per_s(rate)


def _netlab(*arguments: str, **environment: str) -> None:
    done = subprocess.run([NETLAB, *arguments], env=os.environ | environment, check=False)
    if done.returncode:
        raise LabFailed(f"launch/netlab {arguments[0]} ended with status {done.returncode}, see above")
