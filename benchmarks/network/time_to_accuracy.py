"""Wall time until a model is good enough, ours and what one would take instead, on an emulated cluster.

    sudo -E python -m benchmarks.network.time_to_accuracy --data-dir MNIST --rates 1gbit 100mbit --json accuracy.json

Every method gets the learning rate of one small grid that reaches the target in the fewest steps, or comes nearest to
it, judged on held-out training images over an unshaped network. Then it trains at each rate, and the clock stands
still while accuracy is measured. A setting that has its record in the JSON file is not run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.image_data import load_images
from benchmarks.methods import METHODS, methods_over
from benchmarks.models import MODELS
from benchmarks.network.accuracy_ranks import Settings
from benchmarks.network.accuracy_report import plot, table
from benchmarks.network.lab import LAUNCHERS, LabFailed, at_least, file_type, lab, rate_type, run_ranks
from benchmarks.network.records import Record, Records

SETTING = ("hosts", "model", "hidden", "target", "batch", "most_steps", "steps_between", "seeds", "learning_rates")
DEFAULT_METHODS = ["allreduce", "fp16", "topk", "powersgd", "sketch20", "sketch100"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network.time_to_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, help="MNIST's or CIFAR-10's files; default: scikit-learn's digits")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="default: %(default)s")
    parser.add_argument(
        "--hidden", type=at_least(1), default=768, help="width; of resnet9: channels (default: %(default)s)"
    )
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy, a fraction (default: %(default)s)")
    parser.add_argument(
        "--batch", type=at_least(1), default=128, help="images per rank and step (default: %(default)s)"
    )
    told = "give up after so many (default: %(default)s)"
    parser.add_argument("--most-steps", type=at_least(1), default=200, help=told)
    parser.add_argument("--steps-between", type=at_least(1), default=10, help="evaluations (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.8, 0.4, 0.2], metavar="RATE")
    parser.add_argument("--hosts", type=at_least(2), default=4, help="default: %(default)s")
    rates = ["1gbit", "100mbit"]
    parser.add_argument("--rates", type=rate_type, default=rates, nargs="+", metavar="RATE", help="of the network")
    parser.add_argument("--methods", choices=METHODS, default=DEFAULT_METHODS, nargs="+", metavar="METHOD")
    parser.add_argument("--transports", choices=LAUNCHERS, default=list(LAUNCHERS), nargs="+", metavar="TRANSPORT")
    parser.add_argument("--json", type=file_type, default=Path("time_to_accuracy.json"), help="default: %(default)s")
    parser.add_argument("--plot", type=file_type, metavar="FILE", help="PNG of accuracy against bytes")
    arguments = parser.parse_args()
    if not 0 < arguments.target <= 1:
        parser.error(f"--target expects a fraction above 0, at most 1, got {arguments.target:g}")
    return arguments


def run(arguments: argparse.Namespace, common: Record, records: Records) -> None:
    todo = {transport: pending_over(transport, arguments, common, records) for transport in arguments.transports}
    if not any(todo.values()):
        return
    data_dir = str(arguments.data_dir.absolute()) if arguments.data_dir else None
    with lab(arguments.hosts) as name:
        for transport, pending in todo.items():
            if pending:
                settings = Settings(name, pending, data_dir, str(records.path.absolute()), common)
                run_ranks(name, transport, "benchmarks.network.accuracy_ranks", asdict(settings))


def pending_over(
    transport: str, arguments: argparse.Namespace, common: Record, records: Records
) -> list[tuple[str, float | None, list[str]]]:
    """Methods, their learning rates where a search over any transport found them, and rates without a record."""
    wanted = []
    for method in methods_over(transport, arguments.methods):
        about = common | {"method": method}
        searched = [record for record in records.read() if (about | {"search": True}).items() <= record.items()]
        rates = [rate for rate in arguments.rates if not records.has(**about, transport=transport, rate=rate)]
        if rates:
            wanted.append((method, searched[0]["learning_rate"] if searched else None, rates))
    return wanted


def main() -> int:
    arguments = parse_arguments()
    records = Records(arguments.json)
    try:
        data = load_images(arguments.data_dir)
    except FileNotFoundError as error:
        sys.exit(str(error))
    common = {"data": data.name} | {name: getattr(arguments, name) for name in SETTING}
    status = 0
    try:
        run(arguments, common, records)
    except LabFailed as error:
        print(f"{error}; the records up to then are in {records.path}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    trained = [record for record in records.read() if "rate" in record and common.items() <= record.items()]
    print(table(trained))
    if arguments.plot and trained:
        plot(trained, arguments.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
