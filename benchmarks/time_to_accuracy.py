"""Wall time until a model is good enough, ours and what one would take instead, on an emulated cluster.

    sudo -E python benchmarks/time_to_accuracy.py --data-dir MNIST --rates 1gbit 100mbit --json time_to_accuracy.json

Every method gets the learning rate of one small grid that reaches the target in the fewest steps, judged on held-out
training images over an unshaped network. Then it trains at each rate, and the clock stands still while accuracy is
measured. A setting that has its record in the JSON file is not run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from versus.accuracy_report import plot, table
from versus.lab import LAUNCHERS, LabFailed, lab, run_ranks
from versus.methods import METHODS, methods_over
from versus.models import MODELS
from versus.records import Records
from versus.training_ranks import Settings

DEFAULT_METHODS = ["allreduce", "fp16", "topk", "powersgd", "sketch20", "sketch100"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="MNIST's or CIFAR-10's files; default: scikit-learn's digits")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=768, help="width; of resnet9: channels (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy, a fraction (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images per rank and step (default: %(default)s)")
    parser.add_argument("--most-steps", type=int, default=200, help="give up after so many (default: %(default)s)")
    parser.add_argument("--steps-between", type=int, default=10, help="evaluations (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.8, 0.4, 0.2], metavar="RATE")
    parser.add_argument("--hosts", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rates", default=["1gbit", "100mbit"], nargs="+", metavar="RATE", help="of the network")
    parser.add_argument("--methods", choices=METHODS, default=DEFAULT_METHODS, nargs="+", metavar="METHOD")
    parser.add_argument("--transports", choices=LAUNCHERS, default=list(LAUNCHERS), nargs="+", metavar="TRANSPORT")
    parser.add_argument("--json", type=Path, default=Path("time_to_accuracy.json"), help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of accuracy against bytes")
    return parser.parse_args()


def run(arguments: argparse.Namespace, records: Records) -> None:
    with lab(arguments.hosts) as name:
        for transport in arguments.transports:
            pending = pending_over(transport, arguments, records)
            if pending:
                settings = Settings(
                    lab=name,
                    pending=pending,
                    data_dir=str(arguments.data_dir.absolute()) if arguments.data_dir else None,
                    records=str(records.path.absolute()),
                    **{name: getattr(arguments, name) for name in PASSED_ON},
                )
                run_ranks(name, transport, "versus.training_ranks", asdict(settings))


PASSED_ON = ("hosts", "model", "hidden", "target", "batch", "most_steps", "steps_between", "seeds", "learning_rates")


def pending_over(
    transport: str, arguments: argparse.Namespace, records: Records
) -> list[tuple[str, float | None, list[str]]]:
    """Methods, their learning rates where a search over any transport found them, and rates without a record."""
    common = {name: getattr(arguments, name) for name in ("hosts", "model", "hidden", "target", "batch")}
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
    status = 0
    try:
        run(arguments, records)
    except LabFailed as error:
        print(f"{error}; the records up to then are in {records.path}", file=sys.stderr)
        status = 1
    trained = [record for record in records.read() if "rate" in record]
    print(table(trained))
    if arguments.plot and trained:
        plot(trained, arguments.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
