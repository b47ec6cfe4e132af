"""The arguments that all experiments share, and what is said of mistakes in them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.experiment import checkpoint_path
from benchmarks.paper.model_exchange import Workers
from hvd_sketch.transport import Transport, local_transports, resolve_transport

SIMULATION = "simulation"
CPU = torch.device("cpu")


def experiment_parser(about: str) -> argparse.ArgumentParser:
    """With the arguments that every experiment takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the data set's official files")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, seeds 0, 1, … (default: 3)")
    parser.add_argument("--scale", choices=("small", "full"), default="small", help="default: %(default)s")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results; FILE.log.jsonl is the log")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run with this --json stopped")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--transport", choices=(SIMULATION, "mpi", "torch", "horovod"), default=SIMULATION)
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=4, help="when simulated (default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Of the experiments that can run on an accelerator: ``--device``, one that is here."""
    parser.add_argument("--device", type=_device, default=CPU, help="default: %(default)s")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {str(error).splitlines()[0]}") from error


def parse(parser: argparse.ArgumentParser, **least: float) -> argparse.Namespace:
    """Say what cannot work before hours of training, not after them.

    Args:
        least: of an argument, or of each of its values; beside those that every experiment takes.
    """
    arguments = parser.parse_args()
    if not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    if arguments.json.is_dir():
        parser.error(f"--json {arguments.json} is a directory: name a file in it")
    if not arguments.resume and _has_results(arguments.json):
        parser.error(f"--json {arguments.json} has results: add --resume to go on with them, or name another file")
    for name, bound in {"seeds": 1, "checkpoint_every": 1, **least}.items():
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value >= bound:  # NaN is not
                parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    return arguments


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the optional arguments that the user gave."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _has_results(path: Path) -> bool:
    """Whether there are finished runs or a checkpoint, which a run from the start would replace."""
    if checkpoint_path(path, 0).exists():
        return True
    try:
        return bool(json.loads(path.read_text())["runs"])
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError):
        return True  # somebody's file, but none of ours


def is_simulated(arguments: argparse.Namespace) -> bool:
    """Whether all workers are in this process."""
    return arguments.transport == SIMULATION


def connect(arguments: argparse.Namespace) -> tuple[Transport, Workers]:
    """Between the processes of the experiment, and the workers: simulated ones, or one on each rank.

    Communication: collective.
    """
    if getattr(arguments, "device", CPU).type == "cpu":
        torch.set_num_threads(1)  # batches are too small to share, and every rank rounds alike
    if is_simulated(arguments):
        return local_transports(1)[0], arguments.workers
    transport = resolve_transport(arguments.transport)
    return transport, transport


def says_plainly(main: Callable[[], None]) -> Callable[[], None]:
    """Let what a user can mend (data, arguments, a learning rate) end the process with its message, not a traceback."""

    @wraps(main)
    def run() -> None:
        try:
            main()
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    return run
