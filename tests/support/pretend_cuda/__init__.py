"""A CUDA device that is none: tensors that say so and lie on the host, and what a real one does to a program.

- An operation on tensors of both devices raises, as CUDA's do; a CPU tensor without dimensions is a number.
- Every wait of the host for the device is counted.
- A copy to the host that nobody has waited for has not arrived: its memory holds rubbish until then.
- Memory that a copy to the device still reads must not change until the next wait.
- Triton's kernels run under its interpreter.

It shows nothing of a real device's speed, and nothing of streams beside each other. In a process of its own:
:func:`load`, then torch may be imported, then :func:`tests.support.pretend_cuda.install.install`.
"""

from __future__ import annotations

import ctypes
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("library.cpp")


def build(folder: Path) -> Path:
    """Compile what torch asks of a device, without importing torch; some seconds."""
    torch, library = torch_folder(), folder / "pretend_cuda.so"
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch / 'include'}"]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library), *libraries], check=True, timeout=300)
    return library


def load(library: Path) -> None:
    """Before torch is imported: what it asks once, while it is loaded, must be there."""
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def torch_folder() -> Path:
    """Where torch is installed."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
