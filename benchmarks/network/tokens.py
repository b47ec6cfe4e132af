"""Tokens per second of a language model's training on an emulated cluster, ours and what one would take instead.

    sudo -E python -m benchmarks.network.tokens --data-dir DATA --hosts 4 8 --rates 100mbit 1gbit none

Every method trains the same model, with AdamW where its title names no other optimizer. "alone" exchanges nothing: what
a network that costs nothing would give.
A setting that has its record in the JSON file is not measured again. What loss each method reaches in as many steps:
:mod:`benchmarks.language_model`. ``--plot`` draws that loss over the seconds of the training, where there is a record
of one with as many hosts and as large a batch (of the task ``lm``: ``--hosts 4 --batch 4``, ``--hosts 8 --batch 2``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.accuracy_per_byte.__main__ import RESULTS
from benchmarks.accuracy_per_byte.records import read
from benchmarks.accuracy_per_byte.report import best_runs
from benchmarks.accuracy_per_byte.tasks import TASKS
from benchmarks.figures import Record, grouped, markdown
from benchmarks.network import tokens_figure
from benchmarks.network.lab import UNSHAPED, at_least, bits_per_s, network_parser, run_pending, status_of
from benchmarks.network.records import Records
from benchmarks.network.tokens_ranks import METHODS

SETTING = ("task", "batch", "steps", "budget_s")
WORLD = ("task", "batch", "transport", "hosts")


def parse_arguments() -> argparse.Namespace:
    rates = (UNSHAPED, "1gbit", "100mbit")
    told = "losses over the seconds of a training"
    parser = network_parser(__doc__ or "", "tokens", tuple(METHODS), rates, plot=told, choices=METHODS)
    parser.set_defaults(transports=["torch"])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with text/")
    texts = [name for name, task in TASKS.items() if task.adam and not task.begins_with]
    parser.add_argument("--task", choices=texts, default="wikitext10m", help="default: %(default)s")
    parser.add_argument(
        "--batch", type=at_least(1), default=1, help="sequences per rank and step (default: %(default)s)"
    )
    told = "at least, of each setting (default: %(default)s)"
    parser.add_argument("--steps", type=at_least(1), default=4, help=told)
    parser.add_argument("--budget-s", type=float, default=20, help="for each setting (default: %(default)s)")
    parser.add_argument("--hosts", type=at_least(2), default=[4], nargs="+", metavar="N", help="default: 4")
    arguments = parser.parse_args()
    if not (arguments.data_dir / "text").is_dir():
        parser.error(f"--data-dir expects a folder with text/, got {arguments.data_dir}")
    return arguments


def run(arguments: argparse.Namespace, common: Record, records: Records) -> None:
    for hosts in arguments.hosts:
        about = common | {"hosts": hosts}
        todo = {transport: pending_over(transport, arguments, about, records) for transport in arguments.transports}
        settings = {"data_dir": str(arguments.data_dir.absolute()), "common": about}
        run_pending("benchmarks.network.tokens_ranks", hosts, todo, records, settings)


def pending_over(
    transport: str, arguments: argparse.Namespace, about: Record, records: Records
) -> list[tuple[str, list[str]]]:
    """Methods, and the network's rates without a record."""
    wanted = []
    for method in arguments.methods:
        of = about | {"method": method, "transport": transport}
        if rates := [rate for rate in arguments.rates if not records.has(**of, rate=rate)]:
            wanted.append((method, rates))
    return wanted


def table(records: Sequence[Record]) -> str:
    """One table for each model, transport and number of hosts; in brackets how many times dense in bfloat16."""
    return "\n\n".join(_table(own) for _, own in grouped(records, *WORLD).items())


def _table(records: Sequence[Record]) -> str:
    rates = sorted({record["rate"] for record in records}, key=bits_per_s)
    dense = {record["rate"]: record["tokens_per_s"] for record in records if record["method"] == "dense16"}
    rows = []
    for (method,), own in grouped(records, "method").items():
        by_rate = {record["rate"]: record["tokens_per_s"] for record in own}
        cells = [_told(by_rate.get(rate), dense.get(rate)) for rate in rates]
        rows.append([METHODS[method].title, *cells, f"{own[0]['interface']['mean_bytes'] / 1000:,.1f}"])
    first = records[0]
    about = (
        f"{TASKS[first['task']].title}; {first['hosts']} hosts, {first['transport']}, {first['tokens']} tokens a step"
    )
    head = f" | {' | '.join(f'tokens/s at {rate}' for rate in rates)} | kB per step and host"
    return f"{about}\n\n{markdown(head, rows)}"


def _told(tokens_per_s: float | None, dense: float | None) -> str:
    if tokens_per_s is None:
        return ""
    return f"{tokens_per_s:,.0f}" + (f" ({tokens_per_s / dense:.1f})" if dense else "")


def main() -> int:
    arguments = parse_arguments()
    records = Records(arguments.json)
    common = {name: getattr(arguments, name) for name in SETTING}
    status = 0 if arguments.from_records else status_of(partial(run, arguments, common, records), records)
    if measured := [record for record in records.read() if common.items() <= record.items()]:
        print(table(measured))
    if arguments.plot:
        of_task = [record for record in records.read() if record["task"] == arguments.task]
        best = best_runs(read(RESULTS))
        if not tokens_figure.plot(of_task, best, arguments.plot):
            sys.exit(f"--plot: no training of {arguments.task} with as many hosts and as large a batch is in {RESULTS}")
        print(f"\n{tokens_figure.table(of_task, best)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
