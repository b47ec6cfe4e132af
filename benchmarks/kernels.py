"""Check, then time, the CPU kernels against a copy of the vector and against the usual torch implementation.

    python benchmarks/kernels.py --dim 25000000 --rows 5 --cols 500000 --threads 2

"torch style" stores buckets and signs per coordinate and row, sketches by ``torch.bincount`` and recovers by
gather, ``median`` and ``topk``. Here it uses the buckets and signs of ``BlockHash``, so that both must agree.
Times are of interleaved rounds: on a shared machine a disturbance meets all operations alike. Exits with 1
and times nothing when a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import cpu, reference
from hvd_sketch.selection import select_largest
from hvd_sketch.transport.local import local_transports

CHUNK = 1 << 20  # coordinates whose buckets are computed at once
TORCH_REPEATS = 3  # the torch style takes seconds


class TorchStyle:
    """Count Sketch with a stored bucket (int64) and sign (float32) per coordinate and row."""

    def __init__(self, hash: BlockHash) -> None:
        self.hash = hash
        self.buckets = torch.empty(hash.rows, hash.dim, dtype=torch.int64)
        self.signs = torch.empty(hash.rows, hash.dim, dtype=torch.float32)
        for start in range(0, hash.dim, CHUNK):
            index = np.arange(start, min(start + CHUNK, hash.dim))
            for row in range(hash.rows):
                shard, column = hash.cells(row, index)
                self.buckets[row, start : start + CHUNK] = torch.from_numpy(shard * hash.shard_cols + column)
                self.signs[row, start : start + CHUNK] = torch.from_numpy(hash.signs(row, index))

    def sketch(self, values: Tensor) -> Tensor:
        cells = self.hash.shards * self.hash.shard_cols
        pairs = zip(self.buckets, self.signs, strict=True)
        return torch.stack([torch.bincount(b, weights=s * values, minlength=cells) for b, s in pairs])

    def votes(self, table: Tensor) -> Tensor:
        return torch.stack([row[b] * s for row, b, s in zip(table, self.buckets, self.signs, strict=True)])

    def recover(self, table: Tensor, count: int) -> Tensor:
        return self.votes(table).median(dim=0).values.abs().topk(count).indices


def recover(hash: BlockHash, table: Tensor, count: int) -> Tensor:
    return select_largest(cpu, cpu.estimate(hash, table, 0, hash.dim), count, local_transports(1)[0])


def wrong_results(hash: BlockHash, torch_style: TorchStyle) -> list[str]:
    """What the kernels get wrong: against the reference on small sizes, the torch style on this one."""
    wrong = []
    for dim in (1, 777, 100_003):
        small = BlockHash(dim, hash.rows, max(dim // 5, hash.shards), hash.shards, seed=1)
        values = torch.randn(dim)
        ours, theirs = torch.zeros(small.table_shape), torch.zeros(small.table_shape)
        cpu.accumulate_(small, ours, values, 0)
        reference.accumulate_(small, theirs, values, 0)
        if not torch.equal(ours, theirs):
            wrong.append(f"table at dim {dim}: differs from the reference")
        elif not torch.equal(cpu.estimate(small, ours, 0, dim), reference.estimate(small, ours, 0, dim)):
            wrong.append(f"estimate at dim {dim}: differs from the reference")

    values = torch.randint(-8, 9, (hash.dim,)).float()  # integers: every order of addition gives one sum
    table = torch.zeros(hash.table_shape)
    cpu.accumulate_(hash, table, values, 0)
    flat = table.reshape(hash.rows, -1)
    if not torch.equal(flat, torch_style.sketch(values).float()):
        wrong.append("table: differs from the torch style's")
    estimates = cpu.estimate(hash, table, 0, hash.dim)
    ordered = torch_style.votes(flat).sort(dim=0).values
    if not torch.equal(estimates, (ordered[(hash.rows - 1) // 2] + ordered[hash.rows // 2]) * 0.5):
        wrong.append("estimate: differs from the torch style's")
    del ordered
    count = min(hash.dim, max(1, hash.dim // 25))
    least = estimates.abs().topk(count).values[-1]
    chosen = recover(hash, table, count)
    expected = min(count, int(estimates.count_nonzero()))
    magnitudes = estimates[chosen].abs()
    if chosen.numel() != expected or bool((magnitudes < least).any()) or bool((chosen.diff() <= 0).any()):
        wrong.append(f"recovery: {chosen.numel()} of {expected}, or not the largest, or not ascending")
    return wrong


def time_ms(operations: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock milliseconds of each operation in each round, after one round to warm up."""
    elapsed: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats + 1):
        for name, operation in operations.items():
            begin = time.perf_counter()
            operation()
            elapsed[name].append((time.perf_counter() - begin) * 1e3)
    return {name: values[1:] for name, values in elapsed.items()}


def measure(hash: BlockHash, torch_style: TorchStyle, count: int, repeats: int) -> dict[str, list[float]]:
    values = torch.randn(hash.dim)
    buffer = torch.zeros(hash.dim)
    table = torch.zeros(hash.table_shape)
    cpu.accumulate_(hash, table, values, 0)
    flat = table.reshape(hash.rows, -1).clone()
    scratch = torch.zeros(hash.table_shape)
    estimates = cpu.estimate(hash, table, 0, hash.dim)
    comm = local_transports(1)[0]
    ours: dict[str, Callable[[], object]] = {
        "copy": lambda: buffer.copy_(values),
        "sketch": lambda: cpu.accumulate_(hash, scratch, values, 0),
        "estimate": lambda: cpu.estimate(hash, table, 0, hash.dim),
        "histogram": lambda: cpu.magnitude_histogram(estimates, 0, 21, 10),
        "select": lambda: select_largest(cpu, estimates, count, comm),
        "recovery": lambda: recover(hash, table, count),
    }
    theirs: dict[str, Callable[[], object]] = {
        "torch sketch": lambda: torch_style.sketch(values),
        "torch recovery": lambda: torch_style.recover(flat, count),
    }
    return time_ms(ours, repeats) | time_ms(theirs, min(repeats, TORCH_REPEATS))


def print_table(elapsed: dict[str, list[float]]) -> None:
    copy = statistics.median(elapsed["copy"])
    print(f"{'':16}{'median ms':>12}{'min ms':>12}{'copies':>10}{'x torch':>10}")
    for name, times in elapsed.items():
        median = statistics.median(times)
        torch_times = elapsed.get(f"torch {name}")
        faster = f"{statistics.median(torch_times) / median:10.1f}" if torch_times else ""
        print(f"{name:16}{median:12.2f}{min(times):12.2f}{median / copy:10.2f}{faster}")


def environment(threads: int) -> dict[str, object]:
    """Device, thread count, versions and commit of a run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numba": numba.__version__, "numpy": np.__version__}
    return {"device": model, "threads": threads, "versions": versions, "commit": commit}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=25_000_000)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--cols", type=int, default=500_000)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--k", type=int, default=250_000)
    parser.add_argument("--oversample", type=int, default=4, help="recover oversample * k coordinates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for settings, environment and all times")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hash = BlockHash(arguments.dim, arguments.rows, arguments.cols, arguments.shards)
    torch_style = TorchStyle(hash)
    wrong = wrong_results(hash, torch_style)
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    count = min(arguments.dim, arguments.oversample * arguments.k)
    elapsed = measure(hash, torch_style, count, arguments.repeats)
    print_table(elapsed)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        report = settings | environment(arguments.threads) | {"elapsed_ms": elapsed}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
