"""Tensors of the pretended device, and what its operations do."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# Of these the host must know the size or the value of the result.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten.is_nonzero.default, aten.linalg_cholesky.default, aten.multinomial.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
RUBBISH = 0x7F  # in every byte


class DeviceTensor(Tensor):
    """Says that it is on :data:`DEVICE`; ``on_host`` has its values."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: Tensor) -> DeviceTensor:
        layout = {"strides": on_host.stride(), "storage_offset": on_host.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, on_host.shape, **layout, dtype=on_host.dtype, device=DEVICE, requires_grad=False
        )
        made.on_host = on_host
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["on_host"], None  # so that Module.to() swaps its parameters

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> DeviceTensor:
        return DeviceTensor(inner["on_host"])

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return DeviceTensor(self.on_host.clone())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, values: Any) -> None:
        vars(torch._C.TensorBase)["data"].__set__(self, values)
        self.on_host = values.on_host

    def __repr__(self, *_: Any) -> str:
        return f"DeviceTensor({self.on_host})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation} outside of the mode that install() begins: in a thread that was there before?")


class PretendedDevice(TorchDispatchMode):
    """What happens on the device. One mode for all threads.

    Attributes:
        waits: of each thread by its number, where its host waited for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[int, list[str]] = {}
        self._arriving: list[tuple[Tensor, Tensor]] = []  # on the host, and what arrives there
        self._read: list[tuple[Tensor, Tensor, str]] = []  # on the host, what it held, where
        self._pinned: dict[int, Tensor] = {}  # by storage; kept, so that no other storage gets its number
        self._lock = threading.RLock()

    def wait(self, what: str) -> None:
        """The host waits until the device has done all that it was told to."""
        self.waits.setdefault(threading.get_ident(), []).append(f"{what} {_caller()}")
        with self._lock, torch._C._DisableTorchDispatch():
            arriving, self._arriving = self._arriving, []
            for target, values in arriving:
                target.copy_(values)
            read, self._read = self._read, []
            for source, held, where in read:
                assert source.numpy().tobytes() == held.numpy().tobytes(), f"overwritten while it was copied: {where}"

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if operation in SPECIAL:
            return SPECIAL[operation](self, *args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_ours = any(isinstance(leaf, DeviceTensor) for leaf in leaves)
        device = kwargs.get("device")
        if is_ours:
            self._check(operation, args, leaves)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        is_pinned = kwargs.pop("pin_memory", None)
        result = operation(*_on_host(args), **_on_host(kwargs))
        if is_pinned:
            return self._pin(result)
        on_device = is_ours if device is None else device.type == "cuda"
        return _as_given((args, kwargs), result) if on_device else result

    def _check(self, operation: Any, args: Any, leaves: list[Tensor]) -> None:
        others = [leaf for leaf in leaves if not isinstance(leaf, DeviceTensor) and leaf.ndim]
        if operation in WAITING:
            self.wait(str(operation))
        if operation in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait(f"{operation} by a mask")
            elif any(index.device.type == "cpu" for index in indices):
                self.wait(f"{operation} by indices of the host")
            others = [other for other in others if not any(other is index for index in indices)]
        if others:
            kinds = ", ".join(f"{leaf.device} {tuple(leaf.shape)}" for leaf in leaves)
            raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of {kinds}")

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor, *_: Any, **__: Any) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage()._cdata in self._pinned

    def pin_memory(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._pin(tensor.clone())

    def copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        _host(target).copy_(_host(source))
        self._transfer(target, source, non_blocking)
        return target

    def copy_each_(self, targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
        for target, source in zip(targets, sources, strict=True):
            self.copy_(target, source, non_blocking)

    def to_copy(
        self, source: Tensor, *, device: Any = None, non_blocking: bool = False, pin_memory: Any = None, **options: Any
    ) -> Tensor:
        from_device = isinstance(source, DeviceTensor)
        to_device = from_device if device is None else device.type == "cuda"
        made = aten._to_copy.default(_host(source), **options)
        if to_device:
            made = DeviceTensor(made)
        elif pin_memory or (from_device and non_blocking):
            self._pin(made)
        self._transfer(made, source, non_blocking)
        return made

    def _transfer(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """What a copy between the devices, which has been made, means to the host."""
        to_device, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
        if to_device == from_device or not target.numel():
            return
        if not non_blocking:
            self.wait("a copy to the device" if to_device else "a copy to the host")
        elif to_device and self.is_pinned(source):  # other memory has been read on return
            self._read.append((source, source.clone(), _caller()))
        elif from_device and self.is_pinned(target):
            values = target.clone()
            target.view(torch.uint8).fill_(RUBBISH)
            self._arriving.append((target, values))  # last: another thread may wait at any moment
        elif from_device:
            self.wait("a copy to memory that is not pinned")


SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.is_pinned.default: PretendedDevice.is_pinned,
    aten._pin_memory.default: PretendedDevice.pin_memory,
    aten.copy_.default: PretendedDevice.copy_,
    aten._foreach_copy_.default: PretendedDevice.copy_each_,
    aten._to_copy.default: PretendedDevice.to_copy,
}


def _host(tensor: Tensor) -> Tensor:
    return tensor.on_host if isinstance(tensor, DeviceTensor) else tensor


def _on_host(arguments: Any) -> Any:
    return tree_map_only(DeviceTensor, lambda tensor: tensor.on_host, arguments)


def _as_given(arguments: Any, result: Any) -> Any:
    """Results as tensors of the device: those that were given themselves, where an operation returns them."""
    given = {id(leaf.on_host): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, DeviceTensor)}

    def wrapped(tensor: Tensor) -> Tensor:
        return given[id(tensor)] if id(tensor) in given else DeviceTensor(tensor)

    return tree_map_only(Tensor, wrapped, result)


def _caller() -> str:
    """Where in the package it was."""
    frames = [frame for frame in traceback.extract_stack() if "/hvd_sketch/" in frame.filename]
    return " < ".join(f"{frame.filename.rpartition('/hvd_sketch/')[2]}:{frame.lineno}" for frame in frames[:-4:-1])
