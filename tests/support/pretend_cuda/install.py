"""Put the pretended device in the place of torch's."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.kernels import gpu
from tests.support.pretend_cuda.device import DeviceTensor, PretendedDevice, _on_host

PROPERTIES = SimpleNamespace(name="pretended", total_memory=1 << 34, L2_cache_size=1 << 25, multi_processor_count=1)


def install() -> PretendedDevice:
    """From now on this thread, and every thread that begins later, has the device."""
    device = PretendedDevice()
    stream = _Stream(device)
    replaced: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "current_stream": lambda device=None: stream,
            "stream": lambda stream: nullcontext(),
            "device_of": lambda tensor: nullcontext(),
            "Stream": lambda *_, **__: _Stream(device),
            "Event": lambda *_, **__: _Event(device),
            "synchronize": lambda _=None: device.wait("the whole device"),
            "get_device_properties": lambda device=None: PROPERTIES,
            "get_device_name": lambda device=None: PROPERTIES.name,
        },
        torch: {name: _made_on_host(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")},
        torch.backends.cudnn: {"enabled": False},
        gpu: {"_launch": _launched_on_host(gpu._launch)},
        threading.Thread: {"run": _run_with(device, threading.Thread.run)},
    }
    for owner, values in replaced.items():
        for name, value in values.items():
            setattr(owner, name, value)
    device.__enter__()
    return device


class _Stream:
    def __init__(self, device: PretendedDevice) -> None:
        self._device = device

    def record_event(self, *_: Any) -> _Event:
        return _Event(self._device)

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        self._device.wait("a stream")


class _Event:
    def __init__(self, device: PretendedDevice) -> None:
        self._device = device

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        self._device.wait("an event")


def _made_on_host(make: Any) -> Any:
    """These would copy without asking the mode."""

    def made(data: Any, *arguments: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(data, *arguments, device=device, **options)
        return (data if isinstance(data, DeviceTensor) else make(data, *arguments, **options)).to(device)

    return made


def _launched_on_host(launch: Any) -> Any:
    def launched(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        of_host = [a for a in arguments if isinstance(a, Tensor) and not isinstance(a, DeviceTensor)]
        assert not of_host, f"{kernel} was given {len(of_host)} tensors of the host"
        with torch._C._DisableTorchDispatch():
            launch(kernel, programs, *_on_host(arguments), **constants)

    return launched


def _run_with(device: PretendedDevice, run: Any) -> Any:
    def run_with_device(thread: threading.Thread) -> None:
        with device:
            run(thread)

    return run_with_device
