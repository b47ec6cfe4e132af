"""Language models at equal wire bytes: the comparison of :mod:`benchmarks.accuracy_per_byte`, for transformers.

::

    python -m benchmarks.language_model --data-dir DATA --minutes 60
    python -m benchmarks.language_model --report

The first goes on where it ended. ``DATA/text`` has tinyshakespeare_input.txt, wikitext2_valid.txt and
wikitext2_test.txt. ``--plan inner`` feeds every inner optimizer by every exchange; ``--tasks wikitext10m`` or
``wikitext124m`` trains a larger model, on a GPU where there is one. Tokens per second on a network:
:mod:`benchmarks.network.tokens`.
"""

from __future__ import annotations

from benchmarks.accuracy_per_byte.__main__ import RESULTS, compare
from benchmarks.accuracy_per_byte.plans import WINNERS
from benchmarks.accuracy_per_byte.subjects import TEXT
from benchmarks.paper.command_line import says_plainly

FOLDER = RESULTS.parents[1] / "language_model"


@says_plainly
def main() -> None:
    compare("benchmarks.language_model", TEXT, plan="language", methods=list(WINNERS), ratios=[60.0], folder=FOLDER)


if __name__ == "__main__":
    main()
