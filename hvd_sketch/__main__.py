"""``python -m hvd_sketch``: print the version, or compile the kernels before a job needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvd_sketch import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Bad use raises ``SystemExit(2)``. Communication: none."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_sketch",
        description="Sketched gradient exchange for PyTorch over torch.distributed, Horovod and MPI.",
    )
    parser.add_argument("--version", action="version", version=f"hvd_sketch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compile the CPU kernels now and keep them (beside the package, or in NUMBA_CACHE_DIR): no job waits for it"
    commands.add_parser("warm-up", help=text, description=text)
    parser.parse_args(arguments)
    from hvd_sketch.warm_up import warm_up  # not before: it imports Numba, which --version does not need

    warm_up(print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
