"""How far ``hvd-sketch plan`` is from measured exchanges, and whether its advice is right there.

    python -m benchmarks.network.plan_check --json benchmarks/results/bandwidth.json

The records of bandwidth.py also hold what ``--measure`` finds: a small and a large collective without a limit to the
rate, and the local work. From that every rate is predicted. Of the collectives the median over all records of a
transport and a number of hosts is taken: single ones vary two-fold where ranks share cores. Advice is right where what
it names is the fastest of what was measured, or takes not 25 % longer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import Record, grouped, markdown
from benchmarks.methods import FEW_BIT_RATIO
from benchmarks.network.lab import bits_per_s
from benchmarks.network.records import Records
from hvd_sketch.commands.measure import Probe
from hvd_sketch.commands.plan import advised
from hvd_sketch.commands.plan_options import shapes_of_size
from hvd_sketch.cost import Network, Workload, methods
from hvd_sketch.measured_costs import CARRIERS, CPU, Work
from hvd_sketch.units import told_seconds

PLANNED = {"allreduce": "dense", "powersgd": "powersgd", "nominate150": "nominate", "lowrank150": "lowrank"}
SETTING = ("transport", "hosts", "dim", "rate")
NETWORK = ("transport", "hosts")
ABOUT = "transport | hosts | coordinates | rate"
WITHIN = 1.25
BURST_S = 0.001  # of its rate a host of launch/netlab may send at once, after a pause


def predicted_s(record: Record, probe: Probe) -> float:
    """Of an exchange, from what was measured of its network without a limit to the rate."""
    name, hosts, local_s = PLANNED[record["method"]], record["hosts"], record["probe"]["local_s"]
    carrier = probe.carrier(CARRIERS[record["transport"]], hosts)
    network = Network(hosts, bits_per_s(record["rate"]) / 8, 0.0, carrier)
    shared = max(1.0, hosts / record["cores"])
    works = {each: Work(shared * work.nanoseconds) for each, work in CPU.items()}
    method = methods(Workload(shapes_of_size(record["dim"]), FEW_BIT_RATIO, works), network)[name]
    if local_s is not None:
        method = replace(method, local_s=local_s)
    unlimited_s = method.seconds(replace(network, bytes_per_s=float("inf")))
    return max(method.seconds(network) - BURST_S, unlimited_s)


def compared(records: Sequence[Record]) -> list[Record]:
    """Those that have a prediction, with it as ``predicted_s``, and the median as ``measured_s``."""
    known = [record for record in records if record["method"] in PLANNED and "probe" in record]
    probes = {where: _median(own) for where, own in grouped(known, *NETWORK).items()}
    return [
        record
        | {"predicted_s": predicted_s(record, probes[tuple(record[name] for name in NETWORK)])}
        | {"measured_s": record["seconds"]["median"]}
        for record in known
    ]


def _median(records: Sequence[Record]) -> Probe:
    names = "collective_s", "bytes_per_s"
    return Probe(*(statistics.median(record["probe"][name] for record in records) for name in names))


def is_close(record: Record) -> bool:
    """Whether a prediction is within 25 % of what was measured."""
    return 1 / WITHIN <= record["predicted_s"] / record["measured_s"] <= WITHIN


def prediction_rows(records: Sequence[Record]) -> list[list[str]]:
    """Of :func:`compared` records, one row each."""
    return [
        [
            *_about(record),
            record["method"],
            told_seconds(record["predicted_s"]),
            told_seconds(record["measured_s"]),
            f"{record['predicted_s'] / record['measured_s']:.2f}",
        ]
        for record in records
    ]


def advice_of(records: Sequence[Record]) -> Record | None:
    """Of :func:`compared` records of one setting: what is advised, what was fastest, how much longer the former took.

    None: there is no dense one, or none of ours.
    """
    predicted = {PLANNED[record["method"]]: record["predicted_s"] for record in records}
    measured = {PLANNED[record["method"]]: record["measured_s"] for record in records}
    if "dense" not in predicted or not {"nominate", "lowrank"} & predicted.keys():
        return None
    name, fastest = advised(predicted), min(measured, key=measured.__getitem__)
    longer = measured[name] / measured[fastest]
    return {"advised": name, "fastest": fastest, "longer": longer, "right": longer <= WITHIN}


def advice_rows(records: Sequence[Record]) -> list[list[str]]:
    """Of :func:`compared` records, a row for every setting of which several methods were measured."""
    rows = []
    for own in grouped(records, *SETTING).values():
        advice = advice_of(own)
        if advice is not None:
            told = "yes" if advice["right"] else "no"
            rows.append([*_about(own[0]), advice["advised"], advice["fastest"], f"{advice['longer']:.2f}", told])
    return rows


def summary_rows(known: Sequence[Record]) -> list[list[str]]:
    """Of :func:`compared` records, a row for every transport and number of hosts, and one for all."""
    groups = [(where, own) for where, own in grouped(known, *NETWORK).items()]
    rows = []
    for (transport, hosts), own in [*groups, (("all", ""), list(known))]:
        advice = advice_rows(own)
        close = {tuple(record[name] for name in SETTING) for record in own if is_close(record)}
        right = sum(row[-1] == "yes" for row in advice)
        within = f"{sum(map(is_close, own))} of {len(own)}"
        rows.append([transport, str(hosts), within, str(len(close)), f"{right} of {len(advice)}"])
    return rows


def report(records: Sequence[Record]) -> str:
    """Every prediction, every piece of advice, and how many of them are close and right."""
    known = compared(records)
    head = f"transport | hosts | predictions within {WITHIN - 1:.0%} | in settings | advice right"
    return "\n\n".join(
        [
            markdown(f"{ABOUT} | method | predicted | measured | predicted / measured", prediction_rows(known)),
            markdown(f"{ABOUT} | advised | fastest | times as long | right", advice_rows(known)),
            markdown(head, summary_rows(known)),
        ]
    )


def _about(record: Record) -> list[str]:
    return [record["transport"], str(record["hosts"]), f"{record['dim']:,}", record["rate"]]


def main() -> None:
    """Print the tables and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="records of bandwidth.py")
    print(report(Records(parser.parse_args().json).read()))


if __name__ == "__main__":
    main()
