"""Check, then time, the sketch kernels and a whole local step against a copy of the vector and against torch.

    python -m benchmarks.kernels                                   # dim 25 M, 3 and 5 rows, 500 k columns
    python -m benchmarks.kernels --dims 1e6 6.5e6 25e6 100e6       # columns: a fiftieth of dim
    python -m benchmarks.kernels --device cuda --dims 25e6 100e6 1e9 --no-torch

"copies" is the time in units of a ``copy_`` of the vector into a touched buffer in the same run; "bandwidth" is the
share of that copy's bandwidth that the bytes an operation must move through memory come to; "x torch" is how much
faster it is than the same in torch (``bincount``, gather, ``median``, ``topk``: torch_style.py). "hash alone" evaluates
signs and offsets and touches no data. On a GPU "L2 read" and "L2 add" are probes of the level-2 cache, whose
"bandwidth" is a multiple of the copy's, and "limit" is the share of the bound that hvd_sketch/kernels/gpu.py derives.

"quantise + pack" makes 4-bit codes of P k values, "unpack + add" sums those of 4 ranks; "few-bit codes" is both.
"nominated step" is a step of one of 4 ranks with nominated candidates at a wire ratio of 150. The other ranks' messages
are made up. "low-rank step" is one of a rank that is alone, with factors of as few bytes. The unit of both is "copy
beside it", timed in turn with them.

Times are medians of interleaved rounds: on a shared machine a disturbance meets all operations alike. Exits with 1 and
times nothing when a result is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.kernels.measure import measure
from benchmarks.kernels.report import Setting, plot, print_table
from benchmarks.machine import describe_machine
from hvd_sketch.files import replaced


def whole_number(text: str) -> int:
    """25e6 as well as 25000000."""
    return int(float(text))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dims", type=whole_number, nargs="+", default=[25_000_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--cols", type=whole_number, nargs="+", help="default: dim / 50")
    parser.add_argument("--k", type=whole_number, help="default: dim / 100")
    parser.add_argument("--oversample", type=int, default=4, help="recover oversample * k coordinates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-torch", action="store_true", help="leave out the torch style, 12 bytes per row and dim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="settings, machine and all times")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of copies over dim")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Iterable[Setting]:
    for dim in arguments.dims:
        for rows in arguments.rows:
            for cols in arguments.cols or [max(1, dim // 50)]:
                yield Setting(dim, rows, cols, arguments.k or max(1, dim // 100), arguments.oversample)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    machine = describe_machine(device) | {"threads": arguments.threads}
    print(machine["device"], f"{arguments.threads} threads", machine["versions"], sep=", ")
    reports = []
    for setting in settings_of(arguments):
        reports.append(measure(setting, device, arguments.rounds, not arguments.no_torch))
        print_table(reports[-1])
        if arguments.json:  # after each setting: a long run that is ended leaves what it has
            with replaced(arguments.json) as draft:
                draft.write_text(json.dumps(machine | {"settings": reports}, indent=1) + "\n")
    if arguments.plot:
        plot(reports, arguments.plot)


if __name__ == "__main__":
    main()
