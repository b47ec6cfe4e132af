"""The quickstart end to end, shortened: all launchers, the JSON it promises, and the mistakes a user makes."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support.harness import ROOT, run_command

pytestmark = pytest.mark.multiprocess


def quickstart(*arguments: str, folder: Path = ROOT) -> tuple[int, str]:
    command = [str(ROOT / "launch/quickstart.sh"), "-n", "2", "--seeds", "1", "--epochs", "2", *arguments]
    return run_command(["env", "-u", "PYTHONPATH", "-C", str(folder), *command], timeout_s=240)


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun", "horovodrun"])
@pytest.mark.daily
def test_trains_both_sides_and_reports(launcher: str, tmp_path) -> None:
    """From another folder, which has benchmarks of its own."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").touch()
    small = ["--launcher", launcher, "--hidden", "256"]
    status, output = quickstart(*small, "--json", "figures.json", "--plot", "plot.png", folder=tmp_path)
    assert status == 0, output
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["ranks"] == 2
    for side in ("dense", "compressed"):
        assert set(result[side]) == {"test_accuracy", "payload_bytes_per_step", "seconds", "compression_ratio"}
        assert 0.5 < result[side]["test_accuracy"] <= 1, output
    parameters = 64 * 256 + 256 * 256 + 256 * 10 + 256 + 256 + 10
    assert result["dense"]["payload_bytes_per_step"] == pytest.approx(8 * parameters, rel=0.01)
    assert result["compressed"]["compression_ratio"] > 145
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "compressed" in output and "bytes/rank/step" in output


@pytest.mark.slow
@pytest.mark.daily
def test_compressed_is_within_a_point_of_dense_as_a_newcomer_runs_it(tmp_path) -> None:
    """Every default: 4 ranks, three seeds, over 1 M parameters, 150x. 70 s on two cores."""
    figures = tmp_path / "figures.json"
    command = ["launch/quickstart.sh", "--json", str(figures), "--plot", str(tmp_path / "plot.png")]
    status, output = run_command(command, timeout_s=400)
    assert status == 0, output
    result = json.loads(figures.read_text())
    assert result["ranks"] == 4 and result["dense"]["payload_bytes_per_step"] > 8_000_000
    assert result["compressed"]["compression_ratio"] > 145
    assert result["dense"]["test_accuracy"] > 0.95
    assert result["compressed"]["test_accuracy"] > result["dense"]["test_accuracy"] - 0.01, output


def test_reads_mnist_files(tmp_path) -> None:
    """Idx files of noise, one gzipped: the loader is what is tested."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 256), ("t10k", 64)):
        images = struct.pack(">4i", 0x0803, count, 28, 28) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        labels = struct.pack(">2i", 0x0801, count) + rng.integers(0, 10, count, dtype=np.uint8).tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(labels)
    status, output = quickstart("--hidden", "256", "--data-dir", str(tmp_path), "--plot", str(tmp_path / "p.png"))
    assert status == 0, output
    assert "mnist: 256 training and 64 test images" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-dir", "/nowhere"), "train-images-idx3-ubyte"),
        (("--epochs", "0"), "--epochs must be at least 1"),
        (("--json", "/nowhere/figures.json"), "there is no directory /nowhere"),
        (("--launcher", "slurm"), "mpirun, torchrun or horovodrun"),
        (("--batch", "5000"), "more than the training set holds"),
    ],
)
def test_mistakes_are_explained(arguments: tuple[str, ...], message: str) -> None:
    status, output = quickstart(*arguments)
    assert status != 0 and message in output, output
