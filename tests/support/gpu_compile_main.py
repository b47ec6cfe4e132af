"""Compile every GPU kernel for a Hopper GPU, which need not be there; print what the compiler says, as JSON. Some are
also compiled for other GPUs.

The functions of the backend run with launches replaced by compilations, so that what is compiled are the
variants that they launch. To be run by itself: under Triton's interpreter nothing is compiled.

Two processes compile at once. Only kernels whose instructions are looked at are disassembled, each variant once:
half a second each, where a compilation takes as long.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels import gpu_probes
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import gpu
from hvd_sketch.kernels.lag_adam import Settings, State, by_triton_

HOPPER = GPUTarget("cuda", 90, 32)
OTHERS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LIMIT_S = 500
DISASSEMBLED = ("feedback", "accumulate", "dequantize_sum")  # by test_kernels_compile_for_a_gpu
HASHES = (
    BlockHash(1 << 16, 3, 1 << 13),  # as in training: blocks of 256
    BlockHash(100_003, 4, 5_001, 3),  # lengths that are multiples of nothing
    BlockHash(1_000, 9, 70, 2),  # the most rows of a network; blocks of 8
    BlockHash(100, 1, 1),  # blocks of 1
)


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def report(compiled: Any, is_disassembled: bool) -> dict[str, Any]:
    """Bytes of stack and local memory, where spilled registers go, and perhaps the machine instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", cuobjdump("--dump-resource-usage", file.name))
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"
        code = cuobjdump("-sass", file.name) if is_disassembled else ""
    added = re.findall(r"tt.atomic_rmw.*-> tensor<([\dx]+)xf32", compiled.asm["ttgir"])
    about = {"instructions": re.findall(instruction, code, re.MULTILINE), "added": added}
    return about | {name: int(value) for name, value in usage}


def compile_all() -> list[dict[str, Any]]:
    with ProcessPoolExecutor(2) as pool:
        launches = [launch_others, *(partial(launch_all, hash) for hash in HASHES)]
        jobs = [pool.submit(compiled_by, launch, "sm_90", HOPPER) for launch in launches]
        jobs += [pool.submit(compiled_by, launch_some, name, target) for name, target in OTHERS.items()]
        return [kernel for job in jobs for kernel in job.result(timeout=LIMIT_S)]


def compiled_by(launch: Callable[[], None], architecture: str, target: GPUTarget) -> list[dict[str, Any]]:
    """Reports of the variants that a function launches, each once."""
    reports: dict[str, dict[str, Any]] = {}

    def compile_only(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        compiled, name = kernel.warmup(*arguments, grid=(max(programs, 1),), **constants), kernel.fn.__name__
        if compiled.hash not in reports:
            about = {"name": name, "architecture": architecture, "constants": constants}
            reports[compiled.hash] = about | (report(compiled, name in DISASSEMBLED) if target == HOPPER else {})

    device = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(device)
    with mock.patch.object(gpu, "_launch", compile_only), mock.patch.object(torch, "empty", torch.zeros):
        launch()
    return list(reports.values())


def launch_others() -> None:
    """What does not depend on a hash, and hashes of extreme sizes."""
    many_rows = BlockHash(1 << 16, 12, 1 << 13)
    gpu.estimate(many_rows, torch.zeros(many_rows.table_shape), 0, many_rows.dim)
    for dtype in gpu.DTYPES:
        targets, starts, values = [torch.zeros(99, dtype=dtype)] * 3, torch.zeros(4).long(), torch.zeros(297)
        gpu.scatter_(targets, starts, torch.arange(297), values)
    far = BlockHash(1 << 34, 3, 1 << 13)
    table, v, start = torch.zeros(far.table_shape), torch.zeros(1000), far.dim - 1000
    gpu.accumulate_atomic_(far, table, v, start)
    gpu.accumulate_gather_(far, table, v, start)
    gpu.estimate(far, table, start, far.dim)
    gpu_probes.hash_only(many_rows, table.device)
    for adding in (False, True):
        gpu_probes.walk(v, 2, adding)


def launch_some() -> None:
    """Kernels of a training step, once each."""
    hash = HASHES[0]
    table, v = torch.zeros(hash.table_shape), torch.zeros(hash.dim)
    gpu.feedback_accumulate_(hash, table, v, v, v, 0.9, 0)
    gpu.accumulate_gather_(hash, table, v, 0, range(1))
    gpu.owned_histogram_kept(hash, table[:, 0].contiguous(), 0, 1, 12, 64, 100)
    gpu.subtract_at_(v, torch.arange(100), v[:100])
    gpu.dequantize_sum(gpu.quantize(v.view(1, -1), 4).unsqueeze(0), v.numel(), 4)
    gpu.scatter_([v], torch.tensor([0, len(v)]), torch.arange(100), v[:100])
    by_triton_(v, v, State(v, v, torch.zeros(hash.dim, dtype=torch.int32)), Settings(2, 0.1, 0.9, 0.999, 1e-8, 0.01))


def launch_all(hash: BlockHash) -> None:
    """Every kernel; feedback in its variants."""
    table, v = torch.zeros(hash.table_shape), torch.zeros(hash.dim)
    shard_table = table[:, 0].contiguous()
    gpu.feedback_(v, v, v, 0.9)
    gpu.feedback_accumulate_(hash, table, v, v, v, 0.9, 0)
    gpu.feedback_accumulate_(hash, table, None, v, v, 0.0, 0)
    gpu.accumulate_atomic_(hash, table, v, 0)
    gpu.accumulate_gather_(hash, table, v, 0, range(1))
    gpu.estimate(hash, table, 0, hash.dim)
    gpu.owned_histogram(hash, shard_table, 0, 0, 21, 1024)
    gpu.owned_above(hash, shard_table, 0, 1)
    gpu.owned_histogram_kept(hash, shard_table, 0, 1, 12, 64, 100)
    gpu.magnitude_histogram(v, 0, 0, 2048)
    gpu.select_above(v, 1)
    gpu.subtract_at_(v, torch.arange(100), v[:100])
    state = State(v, v, torch.zeros(hash.dim, dtype=torch.int32))
    by_triton_(v, v, state, Settings(2, 0.1, 0.9, 0.999, 1e-8, 0.01))
    for bits in gpu.CHUNKS:
        for dither in (None, 3):
            gpu.dequantize_sum(gpu.quantize(v.view(1, -1), bits, dither).unsqueeze(0), v.numel(), bits)


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout, default=str)  # of dtypes
