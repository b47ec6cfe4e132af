"""The whole record of a GPU, rehearsed in small on a CPU: every part runs, leaves its figures and is in the summary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.record import read
from benchmarks.gpu.training import LANGUAGE, RESNET9
from tests.support.harness import ROOT, run_command
from tests.support.pretend_cuda import build

pytestmark = pytest.mark.multiprocess
RUN_ALL = str(ROOT / "benchmarks/gpu/run_all.sh")
PARTS = ("tests", "kernels", "coding", "ranks", "steps", "training", "language")


def write_data(folder: Path) -> None:
    """Noise in the formats of CIFAR-10 and WikiText-2."""
    draw = np.random.default_rng(0)
    (folder / "cifar10").mkdir(parents=True)
    (folder / "text").mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = draw.integers(0, 256, (20, 3073), dtype=np.uint8)
        images[:, 0] %= 10
        images.tofile(folder / f"cifar10/{name}.bin")
    for part in ("valid", "test"):
        (folder / f"text/wikitext2_{part}.txt").write_bytes(bytes(draw.integers(32, 127, 5_000, dtype=np.uint8)))


@pytest.mark.slow
@pytest.mark.daily
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    out = tmp_path / "out"
    command = [RUN_ALL, str(out), "--rehearse", "--data-dir", str(tmp_path / "data")]
    status, output = run_command(command, timeout_s=600, PYTHON="python")
    assert status == 0, output
    record = read(out)
    assert record["machine"]["rehearsal"] and {name: record[name]["status"] for name in PARTS} == dict.fromkeys(
        PARTS, 0
    )
    assert {row["method"] for row in record["ranks"]["mpi"]["rows"]} == {
        "dense",
        "sketch20",
        "nominate150",
        "lowrank150",
    }
    trained = [(row["method"], row["ratio"]) for part in ("training", "language") for row in record[part]["rows"]]
    assert trained == RESNET9 + LANGUAGE
    assert record["steps"]["profile, sketched 20x"]["collectives"] == 5
    assert json.loads((out / "kernels.json").read_text())["settings"][0]["dim"] == 20_000
    assert "not measured" not in (out / "summary.md").read_text().replace("## Goals\n\nnot measured", "")
    files = list(out.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 16 << 20 for file in files)


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a CUDA of its own")
@pytest.mark.parametrize(("part", "methods"), [("training", RESNET9), ("language", LANGUAGE)])
def test_every_method_trains_on_a_pretended_device(part: str, methods: list[tuple[str, float]], tmp_path: Path) -> None:
    """Where tensors of two devices meet, a copy has not arrived, or a thread has no device, a training would fail."""
    write_data(tmp_path / "data")
    library, out = build(tmp_path), tmp_path / "out"
    out.mkdir()
    run = [sys.executable, "-m", "tests.support.pretend_cuda_run", str(library)]
    for module, arguments in (("record", ["rehearse"]), ("training", [str(tmp_path / "data"), part, "--rehearse"])):
        command = [*run, f"benchmarks.gpu.{module}", str(out), *arguments]
        status, output = run_command(command, timeout_s=900, OMP_NUM_THREADS="1")
        assert status == 0, output
    assert read(out)["machine"]["device"] == "pretended"
    assert [(row["method"], row["ratio"]) for row in read(out)[part]["rows"]] == methods


def test_mistakes_are_said_before_anything_runs(tmp_path: Path) -> None:
    for arguments, words in (
        ([], "expected a folder"),
        (["a", "--minutes", "soon"], "--minutes expects a whole number"),
        (["a", "--parts", "kernels speed"], "unknown part speed; there are: tests kernels"),
        (["a", "b"], "expected one folder"),
        (["a", "--data-dir", "nowhere"], "nowhere"),
        (["a", "--fast"], "unknown option --fast"),
    ):
        status, output = run_command(["env", "-C", str(tmp_path), RUN_ALL, *arguments], timeout_s=60)
        assert status == 2 and words in output, output
    status, output = run_command([RUN_ALL, str(tmp_path / "out")], timeout_s=60, PYTHON="python")
    assert status == 2 and "sees no GPU; --rehearse" in output, output
