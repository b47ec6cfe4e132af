"""What a rank says before a step leaves nothing behind."""

from __future__ import annotations

from hvd_sketch.exchange.agreement import Flag, Report, StepAgreement
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import local_transports
from hvd_sketch.transport.metered import MeteredTransport


def test_no_flag_is_kept_for_every_step() -> None:
    """``enum`` keeps each value that a Flag ever had."""
    agreement = StepAgreement(1)
    comm = MeteredTransport(local_transports(1)[0], CommLedger())
    for step in range(100):
        agreement.agree(comm, step, Report(digest=step + 1))
    assert len(Flag._value2member_map_) < 50
