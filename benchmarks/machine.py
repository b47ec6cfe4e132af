"""What a benchmark ran on, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "numba", "triton")


def describe_machine(device: torch.device) -> dict[str, object]:
    """Name of the device, versions and the checkout's commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type != "cuda":
        return {"device": _processor(), "versions": versions, "commit": commit()}
    versions["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"device": torch.cuda.get_device_name(device), "versions": versions, "commit": commit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout; of a copy that is none, what HVD_SKETCH_COMMIT says."""
    folder = str(Path(__file__).parent)
    described = _first_line("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or os.environ.get("HVD_SKETCH_COMMIT") or None


def _first_line(*command: str) -> str:
    """That a program prints; empty where it cannot be run."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return printed.partition("\n")[0].strip()


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which a call's peak exceeds what was in use before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        before = _status_bytes("VmRSS")
        call()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):  # not Linux, or another C library
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
