"""Tokens per second on an emulated network, end to end, and the example that trains a language model on it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy_per_byte.methods import METHODS as TRAINED
from benchmarks.accuracy_per_byte.records import Group
from benchmarks.network import tokens_figure
from benchmarks.network.tokens import table
from benchmarks.network.tokens_ranks import METHODS
from tests.support.harness import run_command
from tests.support.labs import needs_lab

TEXT = "to be or not to be, that is the question. " * 200


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for part in ("valid", "test"):
        (folder / "text" / f"wikitext2_{part}.txt").write_text(TEXT)
    return folder


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.daily
@needs_lab
def test_tokens_end_to_end(data_dir: Path, tmp_path: Path) -> None:
    """Bytes of an interface are those of the exchange: dense in 16 bits 2 (W - 1) / W times the model, and so on."""
    figures = tmp_path / "tokens.json"
    command = [sys.executable, "-m", "benchmarks.network.tokens", "--data-dir", str(data_dir), "--task", "wikitext"]
    command += ["--hosts", "2", "--rates", "100mbit", "--budget-s", "0.2", "--json", str(figures)]
    status, output = run_command([*command, "--methods", "alone", "dense16", "recommended", "rounds"], timeout_s=120)
    assert status == 0, output
    records = {record["method"]: record for record in json.loads(figures.read_text())}
    sent = {method: record["interface"]["mean_bytes"] for method, record in records.items()}
    model_bytes = 277_696 * 2
    assert sent["alone"] < 2000 < sent["recommended"]
    assert sent["dense16"] == pytest.approx(model_bytes, rel=0.15)
    assert 30 < 2 * sent["dense16"] / sent["recommended"] < 65 and sent["rounds"] < sent["recommended"] / 3
    assert records["rounds"]["timed_steps"] % 16 == 0
    speed = {method: record["tokens_per_s"] for method, record in records.items()}
    assert speed["dense16"] < speed["recommended"] and "| no exchange at all |" in output
    written = figures.stat().st_mtime_ns
    status, output = run_command([*command, "--methods", "alone"], timeout_s=60)
    assert status == 0 and figures.stat().st_mtime_ns == written and "netlab" not in output


@pytest.mark.multiprocess
@pytest.mark.parametrize(("launcher", "every"), [("torchrun", "1"), ("mpirun", "4")])
def test_the_example_trains(launcher: str, every: str, data_dir: Path) -> None:
    command = [f"launch/{launcher}.sh", "-n", "2", "--", sys.executable, "-m", "benchmarks.language_model_example"]
    command += ["--data-dir", str(data_dir), "--size", "0.3m", "--steps", "20", "--batch", "4", "--context", "32"]
    status, output = run_command([*command, "--every", every, "--learning-rate", "4e-3"], timeout_s=120)
    assert status == 0, output
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+), [\d,.]+ kB per step, [\d,.]+ tok", output)]
    assert len(losses) == 2 and losses[1] < 3  # random weights: 5.6
    ratio = re.search(r"test loss [\d.]+, ([\d.]+) times fewer bytes than dense", output)
    assert ratio is not None and float(ratio[1]) > 30 * int(every)


def test_the_table_tells_how_many_times_dense() -> None:
    about = {"task": "wikitext", "batch": 1, "transport": "torch", "hosts": 4, "tokens": 256, "rate": "1gbit"}
    sent = {"interface": {"mean_bytes": 2000}}
    speeds = {"alone": 900.0, "dense16": 100.0, "recommended": 450.0}
    text = table([about | sent | {"method": method, "tokens_per_s": speed} for method, speed in speeds.items()])
    assert "| dense, bf16 | 100 (1.0) | 2.0 |" in text and "| 450 (4.5) | 2.0 |" in text


def test_losses_stand_over_the_seconds_of_their_training(tmp_path: Path) -> None:
    speed = {"task": "lm", "batch": 4, "transport": "torch", "hosts": 4, "rate": "1gbit", "tokens": 1024}
    records = [speed | {"method": "allreduce", "tokens_per_s": 512.0}, speed | {"method": "alone", "tokens_per_s": 9.0}]
    best = {
        Group("lm", workers, False, steps, method, ratio): [{"acc": None, "loss": loss, "diverged": False}]
        for workers, steps, method, ratio, loss in [
            (4, 1500, "dense", 1.0, 1.7),
            (4, 300, "dense", 1.0, 2.3),
            (8, 300, "dense", 1.0, 2.2),  # other hosts
            (4, 300, "lowrank4", 60.0, 2.4),  # whose speed was not measured
        ]
    }
    found = tokens_figure.points(records[0], best)
    assert [(point.steps, point.seconds, *point.losses) for point in found] == [(300, 600, 2.3), (1500, 3000, 1.7)]
    assert "| dense, the library's allreduce, 32 bit | 4 | 1500 | 1.700 | 3,000 |" in tokens_figure.table(records, best)
    assert tokens_figure.plot(records, best, tmp_path / "figure.png") and (tmp_path / "figure.png").exists()
    for other in ({"task": "wikitext"}, {"batch": 2}, {"hosts": 3}):
        assert not tokens_figure.plot([records[0] | other], best, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_every_method_names_a_training_that_there_is() -> None:
    for name, method in METHODS.items():
        assert (method.trained is None) == (name == "alone")
        assert method.trained is None or TRAINED[method.trained[0]].every == method.every


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--data-dir nowhere", "--data-dir expects a folder with text/, got nowhere"),
        ("--data-dir {data} --task finetune", "invalid choice: 'finetune'"),
        ("--data-dir {data} --hosts 1", "expected a whole number from 2 on, got '1'"),
        ("--data-dir {data} --task lm --from-records --plot x.png --json no.json", "--plot: no training of lm"),
    ],
)
def test_mistakes_are_told(arguments: str, told: str, data_dir: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.network.tokens", *arguments.format(data=data_dir).split()]
    status, output = run_command(command, timeout_s=60)
    assert status != 0 and told in output and "Traceback" not in output
