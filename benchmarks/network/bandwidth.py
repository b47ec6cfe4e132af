"""Time per exchange against the network's bandwidth, ours and what one would take instead, on an emulated cluster.

    sudo -E python -m benchmarks.network.bandwidth --hosts 4 --dims 25e6 --rates 1gbit 100mbit --json bandwidth.json

Makes the hosts with launch/netlab, checks every method, then times it. A setting that has its record in the JSON file
is not measured again, so a run that was cut off goes on where it ended.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from benchmarks.methods import METHODS, methods_over
from benchmarks.network.bandwidth_figures import plot
from benchmarks.network.bandwidth_report import tables
from benchmarks.network.lab import UNSHAPED, at_least, network_parser, run_pending, status_of
from benchmarks.network.records import Records

RATES = (UNSHAPED, "10gbit", "1gbit", "100mbit")


def parse_arguments() -> argparse.Namespace:
    parser = network_parser(__doc__ or "", "bandwidth", tuple(METHODS), RATES, "time against bandwidth")
    many = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--dims", type=at_least(1), default=[10**6, 6_500_000, 25 * 10**6], **many)
    parser.add_argument("--hosts", type=at_least(2), default=[2, 4, 8], **many)
    told = "at most, for each setting (default: %(default)s)"
    parser.add_argument("--repeats", type=at_least(2), default=10, help=told)
    parser.add_argument("--budget-s", type=float, default=5, help="for each setting, 2 repeats at least (default: 5)")
    arguments = parser.parse_args()
    if not any(methods_over(transport, arguments.methods) for transport in arguments.transports):
        parser.error(f"there is no {' or '.join(arguments.methods)} over {' or '.join(arguments.transports)}")
    return arguments


def measure(arguments: argparse.Namespace, records: Records) -> None:
    for hosts in arguments.hosts:
        settings = {"hosts": hosts, "repeats": arguments.repeats, "budget_s": arguments.budget_s}
        todo = {transport: pending(transport, hosts, arguments, records) for transport in arguments.transports}
        run_pending("benchmarks.network.bandwidth_ranks", hosts, todo, records, settings)


def pending(
    transport: str, hosts: int, arguments: argparse.Namespace, records: Records
) -> list[tuple[str, int, list[str]]]:
    """Methods, dims and rates that have no record yet."""
    wanted = []
    for dim in arguments.dims:
        for method in methods_over(transport, arguments.methods):
            about = {"method": method, "transport": transport, "dim": dim, "hosts": hosts}
            rates = [rate for rate in arguments.rates if not records.has(**about, rate=rate)]
            if rates:
                wanted.append((method, dim, rates))
    return wanted


def main() -> int:
    arguments = parse_arguments()
    records = Records(arguments.json)
    status = 0 if arguments.from_records else status_of(partial(measure, arguments, records), records)
    measured = records.read()
    print(tables(measured))
    if arguments.plot and measured:
        plot(measured, arguments.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
