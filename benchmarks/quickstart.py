"""Train one classifier twice, with dense and with compressed gradient exchange, and compare accuracy and bytes.

Run it on several ranks: ``launch/quickstart.sh``, or ``launch/mpirun.sh -n 4 -- python -m benchmarks.quickstart``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from tqdm import tqdm

import hvd_sketch
from benchmarks.figures import new_figure, save_figure, styles_of
from benchmarks.image_data import Images, hold_out, load_images
from benchmarks.models import mlp
from hvd_sketch.files import replaced
from hvd_sketch.transport import Transport, resolve_transport


@dataclass(frozen=True)
class Method:
    """One way to exchange gradients, with the learning rate and momentum it trains best with."""

    name: str
    ratio: float | None  # of bytes; None: dense
    learning_rate: float
    momentum: float


# Rates and momenta were chosen with --grid on digits and MNIST.
DENSE = Method("dense", None, 0.1, 0.9)
COMPRESSED = Method("compressed", 150.0, 0.1, 0.9)
FIGURES = ("test_accuracy", "payload_bytes_per_step", "seconds", "compression_ratio")
LINES = styles_of({"dense": "dense", "compressed": "lowrank"})  # low rank is what is recommended for this model
NOTES = """
Bytes are payloads handed to collectives, all counted; ratio: what a ring sends for dense over ours.
Rate and momentum (Nesterov's): of a small grid (--grid).
On one machine the network is free, so dense is faster here: the bytes are what a real network would carry."""
GRID = {"learning_rate": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0), "momentum": (0.0, 0.9)}


@dataclass
class Run:
    """What one training showed."""

    test_accuracy: float = 0.0  # a fraction
    losses: list[float] = field(default_factory=list)  # of each epoch, mean over the ranks' batches
    payload_megabytes: list[float] = field(default_factory=list)  # per rank, up to each epoch's end
    payload_bytes_per_step: float = 0.0
    seconds: float = 0.0
    compression_ratio: float = 1.0


def main() -> None:
    arguments = parse_arguments()
    transport = resolve_transport(arguments.transport)
    data = load_images(arguments.data_dir)
    if arguments.grid:
        search_grid(data, transport, arguments)
        return
    runs: dict[str, list[Run]] = {"dense": [], "compressed": []}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for method in (DENSE, COMPRESSED):
            runs[method.name].append(train(method, data, transport, seed, arguments))
    if transport.rank == 0:
        print(report(runs, data, transport.size, arguments))
        if arguments.json:
            with replaced(arguments.json) as draft:
                draft.write_text(json.dumps(summary(runs, transport.size), indent=2) + "\n")
        if arguments.plot:
            plot(runs, arguments.plot)
            print(f"Loss over bytes: {arguments.plot}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's idx files; default: scikit-learn's digits")
    parser.add_argument("--transport", choices=("mpi", "torch", "horovod"), default="mpi")
    parser.add_argument("--epochs", type=int, help="default: 20 on digits, 2 on MNIST")
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of both hidden layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    told = "PNG of loss over bytes"
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("quickstart.png"), help=told)
    told = "search learning rate and momentum on held-out training data"
    parser.add_argument("--grid", action="store_true", help=told)
    arguments = parser.parse_args()
    for name in ("batch", "hidden", "seeds", "epochs"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            parser.error(f"--{name} must be at least 1, got {given}")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():  # said before the training, not after it
            parser.error(f"--{name} {path}: there is no directory {path.parent}")
    return arguments


def make_optimizer(
    method: Method, model: nn.Module, transport: Transport, seed: int
) -> hvd_sketch.DistributedOptimizer:
    """SGD with Nesterov momentum after the exchange, and what hvd_sketch recommends for the ratio."""
    compression = None
    if method.ratio is not None:
        compression = hvd_sketch.recommended(model.parameters(), method.ratio, transport.size)
        compression = replace(compression, seed=seed)
    nesterov = method.momentum > 0
    inner = torch.optim.SGD(model.parameters(), method.learning_rate, method.momentum, nesterov=nesterov)
    return hvd_sketch.DistributedOptimizer(
        inner, model.named_parameters(), compression=compression, transport=transport
    )


def train(method: Method, data: Images, transport: Transport, seed: int, arguments: argparse.Namespace) -> Run:
    """One training of one side. Both sides see the same initial weights and batches."""
    torch.manual_seed(seed)
    model = mlp(data.train_images.shape[1], arguments.hidden)
    hvd_sketch.broadcast_parameters(model.named_parameters(), 0, transport)
    optimizer = make_optimizer(method, model, transport, seed)
    epochs = arguments.epochs or (20 if data.name == "digits" else 2)
    steps = len(data.train_labels) // (arguments.batch * transport.size)
    if steps == 0:
        raise ValueError(f"--batch {arguments.batch} on {transport.size} ranks is more than the training set holds")
    schedule = {"max_lr": method.learning_rate, "total_steps": epochs * steps, "cycle_momentum": False}
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **schedule)
    run, ledger = Run(), optimizer.ledger
    shown = {"desc": f"{method.name}, seed {seed}", "unit": "step", "disable": transport.rank != 0}
    transport.barrier()
    started = time.perf_counter()
    with tqdm(total=epochs * steps, mininterval=0.5, **shown) as bar:
        for epoch in range(epochs):
            loss_sum = 0.0
            for batch in batches(len(data.train_labels), epoch, steps, transport, seed, arguments.batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
                loss.backward()
                optimizer.step()
                scheduler.step()
                loss_sum += float(loss.detach())
                bar.update()
            total = transport.allreduce_(torch.tensor([loss_sum], dtype=torch.float64))
            run.losses.append(float(total) / (steps * transport.size))
            run.payload_megabytes.append(ledger.totals().payload_bytes / 1e6)
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}", MB=f"{run.payload_megabytes[-1]:.1f}", refresh=False)
        run.seconds = time.perf_counter() - started
    run.payload_bytes_per_step = ledger.totals().payload_bytes / (epochs * steps)
    run.compression_ratio = ledger.compression_ratio()
    with torch.no_grad():
        run.test_accuracy = float((model(data.test_images).argmax(1) == data.test_labels).double().mean())
    return run


def batches(images: int, epoch: int, steps: int, transport: Transport, seed: int, batch: int) -> list[torch.Tensor]:
    """This rank's share of one shuffle that all ranks know: ``steps`` batches of indices."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    own = order[transport.rank :: transport.size]
    return list(own[: steps * batch].split(batch))


def summary(runs: dict[str, list[Run]], ranks: int) -> dict:
    """The figures, means over seeds; accuracy as a fraction."""

    means = {side: {name: mean(getattr(run, name) for run in of) for name in FIGURES} for side, of in runs.items()}
    return {"ranks": ranks, **means}


def report(runs: dict[str, list[Run]], data: Images, ranks: int, arguments: argparse.Namespace) -> str:
    """The table that a reader wants first."""
    parameters = sum(p.numel() for p in mlp(data.train_images.shape[1], arguments.hidden).parameters())
    lines = [
        "",
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test images, "
        f"{parameters:,} parameters, {ranks} ranks ({arguments.transport}), means over {arguments.seeds} seed(s)",
        f"{'':10}{'accuracy':>9}{'loss':>9}{'bytes/rank/step':>17}{'ratio':>8}{'seconds':>9}{'rate':>7}{'momentum':>10}",
    ]
    for method in (DENSE, COMPRESSED):
        of = {name: mean(getattr(run, name) for run in runs[method.name]) for name in FIGURES}
        loss = mean(run.losses[-1] for run in runs[method.name])
        lines.append(
            f"{method.name:10}{of['test_accuracy']:>9.2%}{loss:>9.4f}{of['payload_bytes_per_step']:>17,.0f}"
            f"{of['compression_ratio']:>7.1f}x{of['seconds']:>9.1f}{method.learning_rate:>7g}{method.momentum:>10g}"
        )
    return "\n".join(lines) + NOTES


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for side, of in runs.items():
        for i, run in enumerate(of):
            label = side if i == 0 else None
            axes.plot(run.payload_megabytes, run.losses, label=label, alpha=0.8, **LINES[side], markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="payload per rank so far (MB)", ylabel="training loss of the epoch")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def search_grid(data: Images, transport: Transport, arguments: argparse.Namespace) -> None:
    """Train every setting on nine tenths of the training set; accuracy on the rest decides, not the test set."""
    for base, rate, momentum in product((DENSE, COMPRESSED), GRID["learning_rate"], GRID["momentum"]):
        method, seeds = replace(base, learning_rate=rate, momentum=momentum), range(arguments.seeds)
        of = [train(method, hold_out(data), transport, arguments.seed + i, arguments) for i in seeds]
        if transport.rank == 0:
            accuracy, loss = mean(r.test_accuracy for r in of), mean(r.losses[-1] for r in of)
            setting = f"{base.name:10} rate {rate:<5g} momentum {momentum:<4g}"
            print(f"{setting} held-out {accuracy:.2%} loss {loss:.4f}")


if __name__ == "__main__":
    main()
