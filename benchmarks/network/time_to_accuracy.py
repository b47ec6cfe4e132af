"""Wall time until a model is good enough, ours and what one would take instead, on an emulated cluster.

    sudo -E python -m benchmarks.network.time_to_accuracy --data-dir MNIST --rates 1gbit 100mbit --json accuracy.json

Every method gets the learning rate and momentum of one small grid that reach the target in the fewest steps, or come
nearest to it, judged on held-out training images over an unshaped network. Then they train at each rate, in turns, and
the clock stands still while accuracy is measured. A setting that has its record in the JSON file is not run again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import methods
from benchmarks.image_data import load_images
from benchmarks.models import MODELS
from benchmarks.network.accuracy_report import plot, table
from benchmarks.network.lab import at_least, network_parser, run_pending, status_of
from benchmarks.network.records import Record, Records

SETTING = (
    "hosts",
    "model",
    "hidden",
    "target",
    "batch",
    "most_steps",
    "steps_between",
    "seeds",
    "learning_rates",
    "momenta",
)
METHODS = ["allreduce", "fp16", "topk", "powersgd", "sketch20", "nominate150", "recommended"]
CHOICES = (*methods.METHODS, "recommended")


def parse_arguments() -> argparse.Namespace:
    rates = ("1gbit", "100mbit")
    parser = network_parser(__doc__ or "", "time_to_accuracy", METHODS, rates, "accuracy against bytes", CHOICES)
    parser.add_argument("--data-dir", type=Path, help="MNIST's or CIFAR-10's files; default: scikit-learn's digits")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="default: %(default)s")
    told = "width; of resnet9: channels (default: %(default)s)"
    parser.add_argument("--hidden", type=at_least(1), default=768, help=told)
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy, a fraction (default: %(default)s)")
    told = "images per rank and step (default: %(default)s)"
    parser.add_argument("--batch", type=at_least(1), default=128, help=told)
    told = "give up after so many (default: %(default)s)"
    parser.add_argument("--most-steps", type=at_least(1), default=200, help=told)
    parser.add_argument("--steps-between", type=at_least(1), default=10, help="evaluations (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.8, 0.4, 0.2], metavar="RATE")
    told = "Nesterov's, after the exchange (default: 0 and 0.9)"
    parser.add_argument("--momenta", type=float, nargs="+", default=[0.0, 0.9], metavar="MOMENTUM", help=told)
    parser.add_argument("--hosts", type=at_least(2), default=4, help="default: %(default)s")
    arguments = parser.parse_args()
    if not 0 < arguments.target <= 1:
        parser.error(f"--target expects a fraction above 0, at most 1, got {arguments.target:g}")
    return arguments


def run(arguments: argparse.Namespace, common: Record, records: Records) -> None:
    todo = {transport: pending_over(transport, arguments, common, records) for transport in arguments.transports}
    data_dir = str(arguments.data_dir.absolute()) if arguments.data_dir else None
    module = "benchmarks.network.accuracy_ranks"
    run_pending(module, arguments.hosts, todo, records, {"data_dir": data_dir, "common": common})


def pending_over(
    transport: str, arguments: argparse.Namespace, common: Record, records: Records
) -> list[tuple[str, dict[str, float] | None, list[str]]]:
    """Methods, their rates where a search over any transport found them, and the network's rates without a record."""
    wanted = []
    for method in methods.methods_over(transport, arguments.methods):
        about = common | {"method": method}
        searched = [record for record in records.read() if (about | {"search": True}).items() <= record.items()]
        rates = [rate for rate in arguments.rates if not records.has(**about, transport=transport, rate=rate)]
        if rates:
            names = ("learning_rate", "momentum")
            known = {name: searched[0][name] for name in names} if searched else None
            wanted.append((method, known, rates))
    return wanted


def main() -> int:
    arguments = parse_arguments()
    records = Records(arguments.json)
    common, status = {}, 0  # of all settings
    if not arguments.from_records:
        try:
            data = load_images(arguments.data_dir)
        except FileNotFoundError as error:
            sys.exit(str(error))
        common = {"data": data.name} | {name: getattr(arguments, name) for name in SETTING}
        status = status_of(partial(run, arguments, common, records), records)
    trained = [record for record in records.read() if "rate" in record and common.items() <= record.items()]
    print(table(trained))
    if arguments.plot and trained:
        plot(trained, arguments.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
