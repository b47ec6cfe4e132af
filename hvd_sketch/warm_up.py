"""Compiling the CPU kernels once after an installation, by one process of a host, before a job needs them.

Numba compiles a kernel in the first call and keeps the result in a folder (beside the package, or in NUMBA_CACHE_DIR).
Without a warm-up every rank compiles the same kernels at the same time, inside the first step.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from inspect import getfile
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
import torch

from hvd_sketch.coding import host
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import _cpu_few_bits as few_bits
from hvd_sketch.kernels import _cpu_lag_adam as lag_adam_loops
from hvd_sketch.kernels import _cpu_loops as loops
from hvd_sketch.kernels import _cpu_low_rank as low_rank_loops
from hvd_sketch.kernels import cpu, lag_adam, low_rank, step_ahead

COMPILING_S = 20  # on one core of a 2.6 GHz Zen 4
DIM = 300  # of the vectors that the kernels are called with
MAGNITUDE_OF_ONE = 0x3F800000
MODULES = (loops, few_bits, low_rank_loops, lag_adam_loops, host)  # whose functions Numba compiles
Report = Callable[[str], None]


def warm_up(report: Report | None = None) -> int:
    """Compile the kernels of a CPU exchange that Numba's cache does not hold; returns at once where it holds all.

    One process of a host compiles while the others wait. Where files cannot be locked every process compiles.
    Any number of threads may call this. Kernels in the cache are not loaded: a kernel's first call does that.

    Args:
        report: called with a sentence when this process begins to compile, and when it begins to wait for another.

    Returns:
        How many kernels this process has compiled.

    Modifies: files in Numba's cache. Communication: none.
    """
    marker = _marker()
    if is_warm():
        return 0
    report = report or (lambda sentence: None)
    with _one_process(marker.parent, report):
        if is_warm():
            return 0
        compiled = _compile(report)
        with suppress(OSError):  # without a marker the next process calls every kernel
            marker.touch()
        return compiled


def _compile(report: Report) -> int:
    before, reported = _compiled(), False
    for call in _calls_of_every_kernel():
        call()
        if not reported and _compiled() > before:
            report(f"compiling the CPU kernels, once after an installation: about {COMPILING_S} s")
            reported = True
    return _compiled() - before


def _compiled() -> int:
    """How many kernels this process has compiled because the cache did not hold them."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in cached_kernels())


def is_warm() -> bool:
    """Whether the cache holds every kernel."""
    return _marker().exists()


def cache_folder() -> Path:
    """Where the kernels of this package are kept."""
    return _marker().parent


@cache
def cached_kernels() -> list:
    """Every compiled function of the kernels and of the host's codes that Numba keeps on disk."""
    functions = [function for module in MODULES for function in vars(module).values()]
    return list({id(f): f for f in functions if hasattr(f, "stats") and f.stats.cache_path is not None}.values())


def _calls_of_every_kernel() -> list[Callable[[], object]]:
    """Calls of each kernel with each combination of types in an exchange; the cheapest to compile comes first."""
    hash = BlockHash(DIM, 3, 40, 2)
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    v, u, table = ones(DIM), ones(DIM), ones(hash.table_shape)
    shard_table = table[:, 0].contiguous()
    some = torch.arange(0, DIM, 3, device="cpu")
    some_int32 = some.int()  # as owned_above returns positions
    return [
        lambda: cpu.clear_(u, some),
        lambda: cpu.gather(v, some, out=ones(len(some))),
        lambda: cpu.feedback_(u, v, v.clone(), 0.5),
        lambda: cpu.feedback_accumulate_(hash, table, u, v, v.clone(), 0.5, 0),
        lambda: cpu.accumulate_(hash, table, v, 0, range(1)),  # row by row, as over MPI
        lambda: cpu.estimate(hash, table, 0, DIM),
        lambda: cpu.owned_histogram(hash, shard_table, 0, 0, 20, 2048),
        lambda: cpu.owned_above(hash, shard_table, 0, 0),
        lambda: cpu.magnitude_histogram(v, 0, 20, 2048),
        lambda: cpu.select_above(v, MAGNITUDE_OF_ONE),
        lambda: cpu.keep_above(some, v[: len(some)], MAGNITUDE_OF_ONE),
        lambda: _call_every_code(some),
        lambda: cpu.keep_above(some_int32, v[: len(some)], MAGNITUDE_OF_ONE),
        lambda: _call_every_code(some_int32),
        lambda: cpu.merge_owned(hash, [some, some]),
        lambda: cpu.values_above(v, MAGNITUDE_OF_ONE, DIM),
        lambda: cpu.scatter_([u], torch.tensor([0, DIM], device="cpu"), some, v[: len(some)]),
        low_rank.warm_up,
        lag_adam.warm_up,
        step_ahead.warm_up,
        lambda: cpu.sums_above(v, u, 0, DIM),
        lambda: cpu.subtract_at_(u, some, v[: len(some)]),
        lambda: cpu.dequantize_sum(cpu.quantize(v.view(1, -1), 4, 1).unsqueeze(0), DIM, 4),
    ]


def _call_every_code(positions: torch.Tensor) -> None:
    values = torch.ones(len(positions), dtype=torch.float32, device="cpu")
    code = host.encode_positions(positions, DIM)
    host.decode_owned(BlockHash(DIM, 3, 40), code, torch.device("cpu"))
    host.decode_union(torch.cat([code, code]), DIM, torch.device("cpu"))
    chosen = host.encode_choice(torch.arange(2, device="cpu"), values)
    host.decode_choices(chosen, 1, len(values), torch.device("cpu"))


@contextmanager
def _one_process(folder: Path, report: Report) -> Iterator[None]:
    """One thread at a time of all processes of a host runs the block; a process that ends lets the next one in."""
    descriptor = _open_lock(folder)
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process of this host, which compiles the CPU kernels")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _open_lock(folder: Path) -> int | None:
    """A lock file in Numba's cache, otherwise in the folder for temporary files; None where neither can be written."""
    for find in (lambda: folder, lambda: Path(tempfile.gettempdir()) / f"hvd_sketch_{os.getuid()}"):
        try:
            place = find()  # which fails where no folder for temporary files can be written
            place.mkdir(parents=True, exist_ok=True)
            return os.open(place / "hvd_sketch_warm_up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
    return None


@cache
def _marker() -> Path:
    """The file that exists where the cache holds every kernel for this processor, this software and these sources.

    Raises:
        ValueError: NUMBA_DISABLE_JIT is set.
    """
    if numba.config.DISABLE_JIT:
        raise ValueError("the kernels for CPUs are compiled, but NUMBA_DISABLE_JIT is set: unset it on every rank")
    sources = [Path(getfile(module)).stat() for module in MODULES]
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    described = [
        *(platform.python_version(), numba.__version__, llvmlite.__version__),
        *(llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()),
        *(f"{source.st_mtime_ns} {source.st_size}" for source in sources),
        *(setting for setting in settings if not setting.startswith(("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"))),
    ]
    fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return Path(str(loops.accumulate.stats.cache_path)) / f"hvd_sketch_warm_{fingerprint}"
