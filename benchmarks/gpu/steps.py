"""A training step of ResNet-9 on one GPU without a network: what an exchange adds to it, and where its time goes.

``python -m benchmarks.gpu.steps OUT``. Times are of interleaved rounds. A profile of ``optimizer.step()`` with the
sketched exchange counts its kernels and the calls in which the host waits for the device; OUT/trace-*.json.gz open in
chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import hvd_sketch
from benchmarks.gpu.record import add, asked
from benchmarks.kernels.measure import time_ms
from benchmarks.paper.resnet9 import ResNet9
from hvd_sketch import SketchConfig
from hvd_sketch.config import Compression
from hvd_sketch.transport import local_transports

RANKS = 4  # that the settings are for
ROUNDS, WARM_UP_STEPS, PROFILED_STEPS = 20, 10, 3
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


class Step:
    """One training step: forward, backward, exchange, SGD."""

    def __init__(self, name: str, width: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = ResNet9(width).to(device, memory_format=torch.channels_last)
        self.images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), device=device)
        momentum = {} if "sketched" in name or "paper" in name else {"momentum": 0.9, "nesterov": True}
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.01, **momentum)
        if name != "no exchange":
            named = list(self.model.named_parameters())
            self.optimizer = hvd_sketch.DistributedOptimizer(
                self.optimizer, named, compression=configuration(name, named), transport=local_transports(1)[0]
            )

    def backward(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.images), self.labels).backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def configuration(name: str, named: list[Any]) -> Compression | None:
    """Of an exchange by its name in the table."""
    if name == "dense":
        return None
    if name == "low rank 150x":
        return hvd_sketch.LowRankConfig(ratio=150)
    dim = hvd_sketch.sketched_dim([parameter for _, parameter in named])
    if name == "paper 20x":
        return SketchConfig.paper(**_sizes(SketchConfig.for_compression(20, dim)))
    candidates = "nominate" if name.startswith("nominated") else "sketch"
    return SketchConfig.for_wire_ratio(20 if "20x" in name else 150, dim, RANKS, candidates=candidates)


def _sizes(config: SketchConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("rows", "cols", "k", "oversample")}


NAMES = ("no exchange", "dense", "sketched 20x", "paper 20x", "nominated 150x", "low rank 150x")


def measure(steps: dict[str, Step], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a step, the medians, over that of the dense one."""
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    operations: dict[str, Callable[[], object]] = {**steps}
    times = time_ms(operations, rounds, device)
    ms = {name: statistics.median(values) for name, values in times.items()}
    return [{"exchange": name, "ms": value, "over_dense": value / ms["dense"]} for name, value in ms.items()]


def profile(step: Step, trace: Path, device: torch.device) -> dict[str, Any]:
    """Of ``optimizer.step()`` alone: kernels by name, launches, and waits of the host, per step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    collectives = 0
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            before = step.optimizer.ledger.totals().collectives
            with torch.profiler.record_function("exchange and step"):
                step.optimizer.step()
            collectives += step.optimizer.ledger.totals().collectives - before
    profiler.export_chrome_trace(str(trace))
    inside = _inside(profiler.events())
    is_kernel = [e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation for e in inside]
    device_events = [event for event, is_one in zip(inside, is_kernel, strict=True) if is_one]
    by_name: dict[str, list[float]] = {}
    for event in device_events:
        by_name.setdefault(event.name, []).append(event.device_time_total)
    kernels = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    count = PROFILED_STEPS
    return {
        "collectives": collectives / count,
        "host_waits": sum(event.name in WAITS for event in inside) / count,
        "launches": sum(event.name.startswith(("cudaLaunch", "cuLaunch")) for event in inside) / count,
        "kernels": [{"name": n[:90], "per_step": len(us) / count, "us": sum(us) / count} for n, us in kernels[:25]],
        "device_us": sum(sum(us) for us in by_name.values()) / count,
    }


def _inside(events: Any) -> list[Any]:
    """The events within the ranges "exchange and step"."""
    host = torch.autograd.DeviceType.CPU
    spans = [e.time_range for e in events if e.name == "exchange and step" and e.device_type == host]
    return [e for e in events if any(span.start <= e.time_range.start <= span.end for span in spans)]


def main() -> None:
    out, is_rehearsal = asked()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, batch, rounds = (8, 8, 1) if is_rehearsal else (64, 512, ROUNDS)
    steps = {name: Step(name, width, batch, device) for name in NAMES}
    rows = measure(steps, device, rounds)
    print(*rows, sep="\n", flush=True)
    add(out, "steps", batch=batch, width=width, rows=rows)
    for name in ("sketched 20x", "nominated 150x"):
        trace = out / f"trace-{name.partition(' ')[0]}.json.gz"
        figures = profile(steps[name], trace, device)
        print(name, figures, flush=True)
        add(out, "steps", **{f"profile, {name}": figures})


if __name__ == "__main__":
    main()
