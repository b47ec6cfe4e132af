"""How far ``hvd-sketch plan`` is from measured exchanges: of records of bandwidth.py, which also hold its measurements.

    python -m benchmarks.network.plan_check --json benchmarks/results/bandwidth.json

The plan knows a small and a large collective without a limit to the rate, and the local work, as ``--measure`` finds
them; then it is asked for every rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import Record, markdown
from benchmarks.methods import FEW_BIT_RATIO
from benchmarks.network.lab import bits_per_s
from benchmarks.network.records import Records
from hvd_sketch.commands.plan import shapes_of_size, told_seconds
from hvd_sketch.cost import NANOSECONDS, Carrier, Network, methods

PLANNED = {"allreduce": "dense", "powersgd": "powersgd", "nominate150": "nominate", "lowrank150": "lowrank"}
HEAD = "transport | hosts | coordinates | rate | method | predicted | measured | predicted / measured"
WITHIN = 1.25


def predicted_s(record: Record) -> float:
    """Of an exchange, from what was measured beside it on an unlimited network."""
    probe = record["probe"]
    carrier = Carrier(probe["collective_s"], probe["bytes_per_s"])
    network = Network(record["hosts"], bits_per_s(record["rate"]) / 8, 0.0, carrier)
    shared = max(1.0, record["hosts"] / record["cores"])
    nanoseconds = {name: shared * each for name, each in NANOSECONDS.items()}
    method = methods(shapes_of_size(record["dim"]), FEW_BIT_RATIO, network, nanoseconds)[PLANNED[record["method"]]]
    if probe["local_s"] is not None:
        method = replace(method, local_s=probe["local_s"])
    return method.seconds(network)


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One for every record that has a prediction."""
    found = []
    for record in records:
        if record["method"] in PLANNED and "probe" in record:
            predicted, measured = predicted_s(record), record["seconds"]["median"]
            where = [record["transport"], str(record["hosts"]), f"{record['dim']:,}", record["rate"], record["method"]]
            found.append([*where, told_seconds(predicted), told_seconds(measured), f"{predicted / measured:.2f}"])
    return found


def main() -> None:
    """Print the table, and how many predictions are close."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="records of bandwidth.py")
    found = rows(Records(parser.parse_args().json).read())
    close = sum(1 / WITHIN <= float(row[-1]) <= WITHIN for row in found)
    print(markdown(HEAD, found))
    print(f"\n{close} of {len(found)} predictions are within {WITHIN - 1:.0%} of what was measured")


if __name__ == "__main__":
    main()
