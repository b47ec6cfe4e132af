"""The benchmarks over an emulated network: what they compute from times, what they refuse to time, both end to end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hvd_sketch
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.image_data import load_images
from benchmarks.kernels.report import L2_BUFFER_BYTES, L2_PASSES, Setting, lines
from benchmarks.methods import FEW_BIT_RATIO, METHODS
from benchmarks.methods.top_k import LocalTopK
from benchmarks.models import MODELS
from benchmarks.network import accuracy_report, bandwidth_report, time_to_accuracy, tokens_ranks
from benchmarks.network.bandwidth_ranks import Inputs, matrices
from benchmarks.network.bandwidth_report import break_even, fastest, name_bandwidth
from benchmarks.network.checks import WrongResult, check, project
from benchmarks.network.records import Records
from benchmarks.network.time_to_accuracy import pending_over
from benchmarks.network.training import OURS, endless_batches
from hvd_sketch import SketchConfig, SketchedAllreduce
from hvd_sketch.hashing import BlockHash, evaluate_cubic
from hvd_sketch.transport import LocalTransport, local_transports, run_local
from tests.support.harness import FIRST_STEP_LIMIT_S, run_command, started, wait_until
from tests.support.labs import needs_lab

INFINITE = float("inf")
DIM = 20_000


def test_break_even_is_exact_for_times_that_are_compute_plus_bytes_over_bandwidth() -> None:
    def seconds(compute_s: float, bits: float) -> dict[float, float]:
        return {bandwidth: compute_s + bits / bandwidth for bandwidth in (1e8, 1e9, 1e10, INFINITE)}

    dense, ours = seconds(0.1, 1.2e9), seconds(0.4, 0.06e9)
    assert break_even(ours, dense) == pytest.approx((1.2e9 - 0.06e9) / (0.4 - 0.1))
    assert break_even(seconds(0.05, 0.06e9), dense) == INFINITE
    assert break_even(seconds(0.05, 1.3e9), dense) == 0.0  # slower where it was measured at the least bandwidth
    assert break_even(dense, dense) == break_even(ours, {}) == 0.0
    assert fastest([dense, ours]) == {1e8: ours[1e8], 1e9: ours[1e9], 1e10: dense[1e10], INFINITE: 0.1}
    assert [name_bandwidth(each) for each in (0.0, 6.31e8, 3.8e9, INFINITE)] == [
        "at no rate measured",
        "below 630 Mbit/s",
        "below 3.8 Gbit/s",
        "at every rate measured",
    ]


def test_transports_are_compared_with_mpi_where_nothing_limits_the_rate() -> None:
    def record(transport: str, seconds: float, rate: str = "none", dim: int = 10**6) -> dict[str, object]:
        about = {"method": "sketch20", "transport": transport, "hosts": 4, "dim": dim, "rate": rate}
        return about | {"seconds": {"median": seconds}}

    timed = [record("mpi", 0.02), record("horovod-mpi", 0.03), record("torch", 0.05), record("torch", 9.0, "1gbit")]
    alone = [record("mpi", 0.1, dim=10), record("horovod-mpi", 0.1, dim=20)]
    *_, head, _, small, large = bandwidth_report.over_mpi(timed + alone).splitlines()
    assert head == "| method | hosts | coordinates | MPI | Horovod over MPI | torch.distributed |"
    assert small == "| sketched 20× | 4 | 10 | 100.0 ms | | |"
    assert large == "| sketched 20× | 4 | 1,000,000 | 20.0 ms | 30.0 ms, 1.5 | 50.0 ms, 2.5 |"
    assert bandwidth_report.over_mpi(timed[:1]) == ""


def test_records_grow_one_by_one_and_are_found_again(tmp_path) -> None:
    records = Records(tmp_path / "records.json")
    assert records.read() == [] and not records.has(method="dense")
    for rate in ("1gbit", "none"):
        records.append({"method": "dense", "rate": rate, "seconds": 1.0})
        assert json.loads(records.path.read_text())[-1]["rate"] == rate
    assert records.has(method="dense", rate="none") and not records.has(method="dense", rate="100mbit")
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]


@pytest.mark.parametrize("dim", [1, 999, 1000, 500_000, 1_000_000, 6_500_000])
def test_matrices_make_up_the_vector(dim: int) -> None:
    assert sum(rows * columns for _, (rows, columns), _ in matrices(dim)) == dim


@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes_its_check(name: str) -> None:
    if name == "fp16":
        pytest.skip("threads have no sums in half precision; the benchmark checks it over Horovod")

    def on_rank(transport: LocalTransport) -> None:
        method = METHODS[name](transport, DIM, matrices(DIM))
        check(method, transport, Inputs(DIM, transport.rank))

    run_local(1 if name == "powersgd" else 3, on_rank)


CONFIG = SketchConfig.for_compression(20, DIM, momentum=0.0)


class Forgetful(LocalTopK):
    """Loses a coordinate that it should have kept."""

    def agree(self):
        update = super().agree()
        self.residual[int(self.residual.abs().argmax())] = 0
        return update


class Rounding(SketchedAllreduce):
    """Sends values that one rank rounds."""

    def agree(self):
        update = super().agree()
        if self._comm.rank == 1:
            update.values[0] *= 1 + 2**-22
        return update


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Forgetful, "do not add up"),
        (Rounding, "same bits"),
    ],
)
def test_the_check_sees_what_is_wrong(make, said: str) -> None:
    def on_rank(transport: LocalTransport) -> None:
        with pytest.raises(WrongResult, match=said):
            check(make(CONFIG, DIM, transport), transport, Inputs(DIM, transport.rank))

    run_local(2, on_rank)


def test_projection_sees_every_coordinate() -> None:
    vector = torch.zeros((1 << 20) + 3)
    for at in (0, 1 << 20, (1 << 20) + 2):
        vector[at] = 1
        assert project(vector) != 0
        vector[at] = 0
    assert project(vector) == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("features", [64, 784, 3072])
def test_models_take_all_images(name: str, features: int) -> None:
    model = MODELS[name](features, 16)
    assert model(torch.zeros(2, features)).shape == (2, 10)
    assert not list(model.buffers())


def benchmark(name: str, *arguments: str, timeout_s: float = 120) -> tuple[int, str]:
    return run_command([sys.executable, "-m", f"benchmarks.{name}", *arguments], timeout_s)


@pytest.mark.slow
@pytest.mark.daily
def test_kernels_end_to_end(tmp_path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    sizes = ["--dims", "2e4", "3e4", "--rows", "3", "--rounds", "1"]
    status, output = benchmark("kernels", *sizes, "--json", str(figures), "--plot", str(picture))
    assert status == 0, output
    measured = json.loads(figures.read_text())
    assert {"python", "torch", "numpy", "numba"} <= measured["versions"].keys() and measured["commit"]
    assert "x torch" in output and "a step's peak memory" in output and "the hash alone" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("dim", "cols"), [(777, 20), (5_000, 300), (5_003, 2_000)])
def test_the_hash_alone_on_a_gpu_is_the_hash(dim: int, cols: int) -> None:
    """Blocks of 4, 64 and 256; the last of each is cut short."""
    gpu_probes = pytest.importorskip("benchmarks.kernels.gpu_probes", reason="no Triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hash = BlockHash(dim, 3, cols)
    sums = gpu_probes.hash_only(hash, device).cpu().numpy()
    block, word = np.arange(hash.blocks), np.arange(0, dim, min(16, hash.block))
    expected = np.zeros(len(sums), dtype=np.int64)
    for row in range(hash.rows):
        signs = evaluate_cubic(hash.sign_coefficients[row], word >> 4).astype(np.int64) & 0xFFFF
        np.add.at(expected, word // gpu_probes.gpu.TILE, signs)
        np.add.at(expected, block * hash.block // gpu_probes.gpu.TILE, hash.offsets(row, block))
    assert sums.tolist() == expected.tolist()


def test_probes_of_l2_read_and_add_to_every_cell() -> None:
    gpu_probes = pytest.importorskip("benchmarks.kernels.gpu_probes", reason="no Triton")
    buffer = torch.arange(3 * gpu_probes.gpu.TILE, device="cuda" if torch.cuda.is_available() else "cpu") % 7
    buffer = buffer.float()
    assert float(gpu_probes.walk(buffer, 2, adding=False).sum()) == 2 * float(buffer.sum())
    added = buffer.clone()
    gpu_probes.walk(added, 2, adding=True)
    assert torch.equal(added, buffer + 2)


def test_limits_take_the_slower_of_memory_and_l2() -> None:
    """A copy of 1 M coordinates takes 1 ms: 8 GB/s. L2 is read 4 times as fast, and adds twice as fast."""
    l2_ms = L2_BUFFER_BYTES * L2_PASSES / 32e6
    elapsed = {"copy": [1.0], "sketch": [5.0], "feedback + sketch": [5.0], "estimate": [1.0]}
    elapsed |= {"L2 read": [l2_ms], "L2 add": [2 * l2_ms]}
    setting = Setting(1_000_000, 5, 1_000, 10, 4)
    by_name = {line["operation"]: line for line in lines(elapsed, setting, l2_bytes=40_000)}
    assert by_name["sketch"]["limit"] == pytest.approx(4 * 5 / 16 / 5)  # L2's, 4 r / A
    assert by_name["estimate"]["limit"] == pytest.approx(4 * 5 / 32)  # L2's, 4 r / L
    assert by_name["feedback + sketch"]["limit"] == pytest.approx(20 / 8 / 5)  # memory's, 20 / M
    assert by_name["L2 read"]["bandwidth"] == pytest.approx(4)
    assert all(line["limit"] is None for line in lines(elapsed, setting, l2_bytes=39_999))


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.daily
@needs_lab
def test_bandwidth_end_to_end(tmp_path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    small = ["--dims", "1e5", "--hosts", "2", "--rates", "none", "1gbit", "--repeats", "2"]
    arguments = [*small, "--transports", "mpi", "--json", str(figures), "--plot", str(picture)]
    status, output = benchmark("network.bandwidth", *arguments)
    assert status == 0, output
    records = json.loads(figures.read_text())
    names = {"dense", "allreduce", "topk", "powersgd", "sketch20", "sketch100", "nominate150", "lowrank150"}
    assert {(r["method"], r["rate"]) for r in records} == {(name, rate) for name in names for rate in ("none", "1gbit")}
    for record in records:
        assert record["seconds"]["q10"] <= record["seconds"]["median"] <= record["seconds"]["q90"]
        assert record["compute_s"] >= 0 and record["network_s"] > 0
        if record["ledger_wire_bytes"] > 50_000:
            payload = record["interface"]["mean_bytes"] - record["interface"]["header_bytes"]
            assert payload == pytest.approx(record["ledger_wire_bytes"], rel=0.1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "sketched 20×" in output
    written = figures.stat().st_mtime_ns
    status, output = benchmark("network.bandwidth", *arguments)  # all is measured: nothing is run again
    assert status == 0 and figures.stat().st_mtime_ns == written and "netlab" not in output


@pytest.mark.multiprocess
@needs_lab
def test_a_lost_host_leaves_the_report_whole(tmp_path) -> None:
    records = Records(tmp_path / "figures.json")
    endless = ["--dims", "1e5", "--hosts", "2", "--repeats", "1000000", "--budget-s", "1", "--rates", "none", "1gbit"]
    command = [sys.executable, "-m", "benchmarks.network.bandwidth", *endless, "--json", str(records.path)]
    with started(command, stderr=subprocess.PIPE) as run:
        wait_until(lambda: len(records.read()) > 1, FIRST_STEP_LIMIT_S)
        lab = f"bench-{run.pid}"
        assert run_command(["launch/netlab", "kill", "--name", lab, f"{lab}-2"], 30)[0] == 0
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "the records up to then are in" in errors, errors
    assert len(records.read()) > 1
    assert not Path(f"/run/netlab/{lab}").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("network.bandwidth --rates fast", "expected a rate such as 100mbit, 2.5gbit or none, got 'fast'"),
        ("network.bandwidth --hosts 1", "expected a whole number from 2 on, got '1'"),
        ("network.bandwidth --dims many", "expected a whole number from 1 on, got 'many'"),
        ("network.bandwidth --repeats 0", "expected a whole number from 2 on, got '0'"),
        ("network.bandwidth --json nowhere/a.json", "in a folder that can be written to, got 'nowhere/a.json'"),
        ("network.bandwidth --methods fp16 --transports mpi", "there is no fp16 over mpi"),
        ("network.bandwidth --json {broken}", "Mend it, or name another --json"),
        ("network.time_to_accuracy --target 95", "--target expects a fraction above 0, at most 1, got 95"),
        ("network.time_to_accuracy --most-steps 0", "expected a whole number from 1 on, got '0'"),
        ("network.time_to_accuracy --data-dir nowhere --json {fresh}", "--data-dir needs the four idx files of MNIST"),
    ],
)
def test_mistakes_are_told_before_there_is_a_network(command: str, told: str, tmp_path: Path) -> None:
    broken, fresh = tmp_path / "broken.json", tmp_path / "fresh.json"
    broken.write_text("[{")
    status, output = benchmark(*command.format(broken=broken, fresh=fresh).split())
    assert status != 0 and told in output and "Traceback" not in output and "netlab" not in output


def test_a_batch_larger_than_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match="100 training images on 1 ranks have no batch of 128"):
        next(endless_batches(100, 128, 0, local_transports(1)[0]))


def test_recommended_is_trained_as_a_user_would_get_it() -> None:
    model = MODELS["mlp"](784, 64)
    assert OURS["recommended"](model, 4) == hvd_sketch.recommended(model.parameters(), FEW_BIT_RATIO, 4)
    assert OURS.keys() <= bandwidth_report.LABELS.keys() & bandwidth_report.KINDS.keys()
    assert set(time_to_accuracy.METHODS) <= set(time_to_accuracy.CHOICES) <= bandwidth_report.LABELS.keys()


@pytest.mark.parametrize("name", [name for name in tokens_ranks.METHODS if name not in ("alone", "powersgd")])
def test_every_method_steps_a_language_model_and_keeps_the_ranks_equal(name: str) -> None:
    """But for what exchanges nothing, and for torch's PowerSGD, whose hook needs a process of its own."""
    method = tokens_ranks.METHODS[name]
    models = [tokens_ranks.initial_model(TASKS["lm"], 65, 0) for _ in range(2)]
    before = [p.detach().clone() for p in models[0].parameters()]

    def on_rank(transport: LocalTransport) -> list[torch.Tensor]:
        model = models[transport.rank]
        inner = torch.optim.AdamW(model.parameters(), 1e-3)
        optimizer = method.wrap(inner, model, transport)
        text = torch.randint(65, (2, 33), generator=torch.Generator().manual_seed(transport.rank))
        for _ in range(method.every):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    first, second = run_local(2, on_rank)
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, first[:1], before[:1]))


def test_other_settings_have_other_records(tmp_path: Path) -> None:
    """Of one file; what differs in anything that decides is trained anew."""
    records = Records(tmp_path / "figures.json")
    common = {"data": "mnist", "seeds": 1, "learning_rates": [0.4]}
    records.append(common | {"method": "topk", "transport": "mpi", "rate": "1gbit"})
    asked = argparse.Namespace(methods=["topk"], rates=["1gbit"])
    assert pending_over("mpi", asked, common, records) == []
    for other in ({"data": "digits"}, {"seeds": 2}, {"learning_rates": [0.4, 0.2]}):
        assert pending_over("mpi", asked, common | other, records) == [("topk", None, ["1gbit"])]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.daily
@needs_lab
def test_bandwidth_over_torch(tmp_path) -> None:
    arguments = ["--dims", "1e5", "--hosts", "2", "--rates", "none", "--repeats", "2", "--methods", "fp16", "sketch20"]
    figures = tmp_path / "figures.json"
    status, output = benchmark("network.bandwidth", *arguments, "--transports", "torch", "--json", str(figures))
    assert status == 0, output
    records = json.loads(figures.read_text())
    assert [(r["transport"], r["method"]) for r in records] == [("torch", "fp16"), ("torch", "sketch20")]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.daily
@needs_lab
def test_time_to_accuracy_end_to_end(tmp_path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    status, output = benchmark(
        "network.time_to_accuracy",
        *("--hosts", "2", "--rates", "1gbit", "--hidden", "128", "--batch", "32", "--target", "0.8"),
        *("--most-steps", "100", "--learning-rates", "0.2", "0.4", "--momenta", "0", "--transports", "mpi"),
        *("--methods", "allreduce", "sketch20", "--json", str(figures), "--plot", str(picture)),
    )
    assert status == 0, output
    records = json.loads(figures.read_text())
    searches = [record for record in records if record.get("search")]
    assert [len(record["tried"]) for record in searches] == [2, 2]
    dense, sketched = (record for record in records if "rate" in record)
    assert (dense["method"], sketched["method"]) == ("allreduce", "sketch20")
    for record in (dense, sketched):
        assert record["reached"] and record["accuracy"] >= 0.8 and record["steps"] <= 100
        assert record["curve"][-1][2] == record["ledger_wire_bytes"] > 0 < record["interface"]["mean_bytes"]
    assert sketched["ratio"] > 3 > dense["ratio"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| sketched 20×, mpi |" in output


def test_tables_and_figures_say_where_ours_loses(tmp_path: Path) -> None:
    def record(method: str, rate: str, seconds: float, dim: int = 1000) -> dict:
        return {
            **{"method": method, "transport": "mpi", "dim": dim, "hosts": 2, "rate": rate, "compute_s": 0.1},
            **{
                "network_s": 0.2,
                "seconds": {"median": seconds},
                "ledger_wire_bytes": 10**6,
                "learning_rate": 0.1,
                "learning_rates": [0.2, 0.1] if method == "powersgd" else [0.2, 0.1, 0.05],
                "momentum": 0.9,
            },
            **{"interface": {"mean_bytes": 10**6}, "reached": seconds < 9, "steps": 7, "ratio": 2.0, "accuracy": 0.5},
        }

    records = [record("allreduce", "1gbit", 1.0), record("powersgd", "1gbit", 0.5), record("sketch20", "1gbit", 9.0)]
    text = bandwidth_report.tables(records)
    assert "at no rate measured" in text and "at every rate measured" in text
    assert "| PowerSGD, rank 4, mpi | 0.1 (edge of the grid) | 0.9 | 7 | **0.5** |" in accuracy_report.table(records)
    assert "| sketched 20×, mpi | 0.1 | 0.9 | 7 |" in accuracy_report.table(records)
    assert "not reached (50.00%)" in accuracy_report.table(records)
    records += [
        record(name, rate, 1.0, 25_000_000) for name in ("allreduce", "sketch100") for rate in ("1gbit", "none")
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    options = ["--json", str(path), "--plot", str(tmp_path / "figure.png"), "--from-records"]
    status, output = benchmark("network.bandwidth", *options)
    assert status == 0 and "at no rate measured" in output, output
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["figure-1000.png", "figure-25M.png"]
    assert json.loads(path.read_text()) == records, "nothing is measured"


def test_cifar10_files_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        images = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        images[:, 0] %= 10
        images.tofile(tmp_path / name)
    data = load_images(tmp_path)
    assert data.name == "cifar10" and data.train_images.shape == (20, 3072) and data.test_images.shape == (4, 3072)
    assert data.test_labels.tolist() == images[:, 0].tolist()
    os.remove(tmp_path / "test_batch.bin")
    with pytest.raises(FileNotFoundError, match="test_batch"):
        load_images(tmp_path)
