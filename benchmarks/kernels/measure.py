"""What ``python -m benchmarks.kernels`` times: kernels one by one, whole steps, and the same in torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.kernels.checks import hash_only, recover, wrong_checksum, wrong_results, wrong_step
from benchmarks.kernels.few_bits import NominatedSteps, few_bit_operations, wrong_few_bits, wrong_nominated_step
from benchmarks.kernels.low_rank import LowRankSteps, wrong_low_rank_step
from benchmarks.kernels.report import COPY_BESIDE, L2_BUFFER_BYTES, L2_PASSES, Setting, lines
from benchmarks.kernels.torch_style import TorchStyle
from benchmarks.machine import peak_memory_of
from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.hashing import BlockHash
from hvd_sketch.kernels import load_backend
from hvd_sketch.model.drift import checksums
from hvd_sketch.transport import local_transports

TORCH_ROUNDS = 3  # the torch style takes seconds
STEPS_BEFORE = 20  # until the residual grows slowly, as it does in all but the first steps of a training
MOMENTUM = 0.9
Operations = dict[str, Callable[[], object]]


def kernel_operations(hash: BlockHash, values: Tensor, count: int) -> Operations:
    """The backend's functions one by one, on buffers of their own."""
    kernels = load_backend(None, values.device)
    buffer, u, v = (torch.zeros_like(values) for _ in range(3))
    scratch = torch.zeros(hash.table_shape, dtype=torch.float32, device=values.device)
    table = torch.zeros_like(scratch)
    kernels.accumulate_(hash, table, values, 0)
    own = table[:, 0].contiguous()
    operations: Operations = {
        "copy": lambda: buffer.copy_(values),
        "finite": lambda: torch.aminmax(values),
        "feedback": lambda: kernels.feedback_(u, v, values, MOMENTUM),
        "sketch": lambda: kernels.accumulate_(hash, scratch, values, 0),
        "feedback + sketch": lambda: kernels.feedback_accumulate_(hash, scratch, u, v, values, MOMENTUM, 0),
        "estimate": lambda: kernels.estimate(hash, table, 0, hash.dim),
        "recovery": lambda: recover(kernels, hash, own, count),
        "checksum": lambda: checksums([values]),
    }
    if kernels.ON_HOST:
        operations["hash alone"] = lambda: hash_only(hash)
    else:
        from benchmarks.kernels import gpu_probes  # which imports Triton

        l2_buffer = torch.zeros(L2_BUFFER_BYTES // 4, device=values.device)
        operations["sketch, gathered"] = lambda: kernels.accumulate_gather_(hash, scratch, values, 0)
        operations["hash alone"] = lambda: gpu_probes.hash_only(hash, values.device)
        operations["L2 read"] = lambda: gpu_probes.walk(l2_buffer, L2_PASSES, adding=False)
        operations["L2 add"] = lambda: gpu_probes.walk(l2_buffer, L2_PASSES, adding=True)
    return operations


def exchange_of(setting: Setting, device: torch.device) -> SketchedAllreduce:
    sizes = {"rows": setting.rows, "cols": setting.cols, "k": setting.k, "oversample": setting.oversample}
    return SketchedAllreduce(
        SketchConfig.paper(**sizes, momentum=MOMENTUM), setting.dim, local_transports(1)[0], device
    )


class Steps:
    """Whole steps of one rank: from the check for NaN and Inf to the zeroing of what was chosen."""

    def __init__(self, setting: Setting, gradients: list[Tensor]) -> None:
        self.exchange = exchange_of(setting, gradients[0].device)
        self._gradients = gradients
        self._done = 0
        for _ in range(STEPS_BEFORE):
            self()

    def __call__(self) -> Tensor:
        self._done += 1
        return self.exchange.step(self._gradients[self._done % len(self._gradients)]).indices


def torch_operations(torch_style: TorchStyle, values: Tensor, setting: Setting) -> Operations:
    u, v = torch.zeros_like(values), torch.zeros_like(values)
    table = torch_style.sketch(values).float()
    return {
        "torch sketch": lambda: torch_style.sketch(values),
        "torch recovery": lambda: torch_style.recover(table, setting.candidates),
        "torch step": lambda: torch_style.step(u, v, values, MOMENTUM, setting.candidates, setting.k),
    }


def time_ms(operations: Operations, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Wall-clock milliseconds of each operation in each round, after one round to warm up."""
    elapsed: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds + 1):
        for name, operation in operations.items():
            _wait_for(device)
            begin = time.perf_counter()
            operation()
            _wait_for(device)
            elapsed[name].append((time.perf_counter() - begin) * 1e3)
    return {name: times[1:] for name, times in elapsed.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setting: Setting, device: torch.device, rounds: int, with_torch: bool) -> dict:
    """Everything about one setting; raises SystemExit before anything is timed if a result is wrong."""
    hash = BlockHash(setting.dim, setting.rows, setting.cols)
    torch_style = TorchStyle(hash, device) if with_torch else None
    gradients = random_gradients(setting, device)
    wrong = wrong_results(hash, torch_style, setting.candidates, device) + wrong_checksum(gradients[0])
    if torch_style is not None and setting.rows % 2:  # torch's median of an even number is the lower middle
        wrong += wrong_step(hash, torch_style, exchange_of(setting, device), gradients[0], MOMENTUM, setting.candidates)
    wrong += wrong_few_bits(device)
    _exit_if(wrong)
    operations = kernel_operations(hash, gradients[0], setting.candidates)
    operations |= few_bit_operations(gradients[0][: setting.candidates])
    elapsed = time_ms(operations, rounds, device)
    elapsed |= time_ms({"step": Steps(setting, gradients)}, rounds, device)
    elapsed |= few_byte_steps_ms(gradients, rounds)
    if torch_style is not None:
        elapsed |= time_ms(torch_operations(torch_style, gradients[0], setting), min(rounds, TORCH_ROUNDS), device)
    extra_bytes = step_extra_bytes(setting, device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    records = lines(elapsed, setting, l2_bytes)
    return {**asdict(setting), "elapsed_ms": elapsed, "step_extra_bytes": extra_bytes, "lines": records}


def few_byte_steps_ms(gradients: list[Tensor], rounds: int) -> dict[str, list[float]]:
    """Steps of nominated candidates and of low rank, and copies of the vector between them."""
    nominated, low_rank, buffer = NominatedSteps(gradients), LowRankSteps(gradients), torch.zeros_like(gradients[0])
    for _ in range(STEPS_BEFORE):
        nominated()
        low_rank()
    _exit_if(wrong_nominated_step(nominated) + wrong_low_rank_step(low_rank))
    operations: Operations = {COPY_BESIDE: lambda: buffer.copy_(gradients[0])}
    operations |= {"nominated step": nominated, "low-rank step": low_rank}
    return time_ms(operations, rounds, gradients[0].device)


def _exit_if(wrong: list[str]) -> None:
    if wrong:
        sys.exit("\n".join(wrong))


def random_gradients(setting: Setting, device: torch.device) -> list[Tensor]:
    return [torch.randn(setting.dim, device=device) ** 3 for _ in range(2)]


def step_extra_bytes(setting: Setting, device: torch.device) -> int | None:
    """Peak memory of a step, on a CPU in a process of its own: what was freed here would hide what it takes."""
    if not load_backend(None, device).ON_HOST:
        return _step_extra_bytes(setting, device, torch.get_num_threads())
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_step_extra_bytes, setting, device, torch.get_num_threads()).result()


def _step_extra_bytes(setting: Setting, device: torch.device, threads: int) -> int | None:
    torch.set_num_threads(threads)
    return peak_memory_of(Steps(setting, random_gradients(setting, device)), device)
