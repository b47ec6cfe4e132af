"""Figures and tables from results: ``python -m benchmarks.paper.make_figures benchmarks/results/paper/*.json``.

One PNG per experiment, beside the first of its files, and its table on the standard output.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Record
from benchmarks.paper import ablations_figure, cifar10_figure, mnist_figure, translation_figure

# From all runs of an experiment and the path of its figure to its table.
DRAW: dict[str, Callable[[list[Record], Path], str]] = {
    "mnist": mnist_figure.draw,
    "cifar10": cifar10_figure.draw,
    "ablations_mnist": ablations_figure.draw,
    "ablations_cifar10": ablations_figure.draw,
    "translation": translation_figure.draw,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what the experiments wrote with --json")
    runs: dict[str, list[Record]] = defaultdict(list)
    figures: dict[str, Path] = {}
    for path in parser.parse_args().results:
        results = json.loads(path.read_text())
        runs[results["experiment"]] += results["runs"]
        figures.setdefault(results["experiment"], path.parent / f"{results['experiment']}.png")
    for experiment, figure in figures.items():
        print(f"{DRAW[experiment](runs[experiment], figure)}\n{figure}")


if __name__ == "__main__":
    main()
