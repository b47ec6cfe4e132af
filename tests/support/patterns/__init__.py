"""What users' training scripts do, run by test_patterns.py on every transport: no rank may drift from the others.

Every ``check_*`` is one pattern; after each all ranks hold equal bits.
"""

from __future__ import annotations

import warnings

from hvd_sketch.transport import Transport
from tests.support.patterns import loops, one_rank_differs

CHECKS = [
    value for module in (one_rank_differs, loops) for name, value in vars(module).items() if name.startswith("check_")
]


def check_all(transport: Transport) -> int:
    """Run every check; returns how many ran."""
    warnings.filterwarnings("ignore", message="all ranks skip this step|rank . is beyond")
    for check in CHECKS:
        check(transport)
        transport.barrier()
    return len(CHECKS)
