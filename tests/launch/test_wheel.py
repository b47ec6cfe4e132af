"""The wheel, installed where no checkout is: what a user gets from pip."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import ROOT

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.daily("wheel")]

LIMIT_S = 600  # of each command: pip may have to download torch, and the kernels are compiled
TRAIN = """
import hashlib
import json

import torch

import hvd_sketch

mpi = hvd_sketch.MPITransport()
torch.manual_seed(mpi.rank)
model = torch.nn.Linear(40, 40, bias=False)
hvd_sketch.broadcast_parameters(model.state_dict(), root_rank=0, transport=mpi)
sketch = hvd_sketch.SketchConfig(cols=200, k=100, momentum=0.0)
inner = torch.optim.SGD(model.parameters(), lr=1.0)
optimizer = hvd_sketch.DistributedOptimizer(inner, model.named_parameters(), sketch=sketch, transport=mpi)
inputs, losses = torch.randn(64, 40), []
for step in range(30):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), inputs)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
digest = hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()
result = {"rank": mpi.rank, "losses": losses, "digest": digest, "package": hvd_sketch.__file__}
with open(f"{mpi.rank}.json", "w") as file:
    json.dump(result, file)
"""


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that must succeed, run where no checkout can be found."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPAL", "OMPI"))}
    if os.getuid() == 0:
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    settings.pop("VIRTUAL_ENV", None)
    line = [str(word) for word in command]
    done = subprocess.run(line, cwd=folder, env=settings, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    """The programs of a bare environment into which pip installed the wheel and its MPI."""
    folder = tmp_path_factory.mktemp("wheel")
    wheels, venv = folder / "wheels", folder / "venv"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels]
    run(*build, _copy_of_the_source(folder), folder=folder)
    (wheel,) = wheels.glob("hvd_sketch-*.whl")
    run(sys.executable, "-m", "venv", venv, folder=folder)
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "-c", ROOT / "launch/constraints.txt", f"{wheel}[mpi]", folder=folder)
    return venv / "bin"


def _copy_of_the_source(folder: Path) -> Path:
    """What the wheel is made of. In the checkout setuptools would leave a folder, and pack what an older build left."""
    source = folder / "source"
    shutil.copytree(ROOT / "hvd_sketch", source / "hvd_sketch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def test_the_package_says_that_it_is_typed(bin_folder: Path) -> None:
    assert len(list(bin_folder.parent.glob("lib/python3*/site-packages/hvd_sketch/py.typed"))) == 1


def test_the_command_line_tells_the_version(bin_folder: Path, tmp_path: Path) -> None:
    assert run(bin_folder / "python", "-m", "hvd_sketch", "--version", folder=tmp_path).startswith("hvd_sketch 0.")


@pytest.mark.parametrize("ranks", [1, 2])  # the first compiles the kernels, once
def test_ranks_train_with_the_mpi_that_pip_brought(bin_folder: Path, ranks: int, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    mpirun = [bin_folder / "mpirun", "-n", str(ranks), "--oversubscribe"] if ranks > 1 else []
    run(*mpirun, bin_folder / "python", "train.py", folder=tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert [result["rank"] for result in results] == list(range(ranks))
    assert len({result["digest"] for result in results}) == 1, "all ranks must have the same parameters"
    for result in results:
        assert result["losses"][-1] < 0.5 * result["losses"][0]
        assert Path(result["package"]).is_relative_to(bin_folder.parent)
