"""The environment of launch/setup.sh works with no variable set: without launch/env.sh, whoever imports MPI first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hvd_sketch.transport.open_mpi import locate_open_mpi
from tests.support.harness import run_command

TRAIN = """
import torch

import hvd_sketch

model = torch.nn.Linear(20, 20)
sketch = hvd_sketch.SketchConfig(cols=60, k=20, dense_below=1)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd_sketch.DistributedOptimizer(inner, model.named_parameters(), sketch, transport={transport!r})
model(torch.ones(20)).sum().backward()
optimizer.step()
print("trained on one rank")
"""
FIRST = {
    "hvd_sketch": "",
    "horovod": "import horovod.torch as hvd; hvd.init()",
    "mpi4py": "from mpi4py import MPI",
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("transport", ["horovod", "mpi"])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.daily
def test_one_rank_trains_without_any_variable(first: str, transport: str, tmp_path) -> None:
    job = tmp_path / "train.py"
    job.write_text(f"{FIRST[first]}\n{TRAIN.format(transport=transport)}")
    bare = ["env", "-i", f"HOME={tmp_path}", "PATH=/usr/bin:/bin"]
    status, output = run_command([*bare, sys.executable, str(job)], timeout_s=180)
    assert (status, output.splitlines()[-1:]) == (0, ["trained on one rank"]), output


# hvd_sketch's own part, which a pip-installed package has without that environment


@pytest.fixture
def prefix(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("OPAL_PREFIX", "")  # so that it is as before afterwards, also where it was not set
    monkeypatch.delenv("OPAL_PREFIX")
    (tmp_path / "lib").mkdir()
    return tmp_path


def test_open_mpi_of_pypi_is_located(prefix: Path) -> None:
    (prefix / "lib/libopen-rte.so.40").touch()
    locate_open_mpi()
    assert os.environ["OPAL_PREFIX"] == str(prefix)


def test_what_the_user_set_stays(prefix: Path, monkeypatch) -> None:
    (prefix / "lib/libopen-rte.so.40").touch()
    monkeypatch.setenv("OPAL_PREFIX", "/opt/of-the-user")
    locate_open_mpi()
    assert os.environ["OPAL_PREFIX"] == "/opt/of-the-user"


def test_another_open_mpi_is_left_alone(prefix: Path) -> None:
    locate_open_mpi()
    assert "OPAL_PREFIX" not in os.environ
