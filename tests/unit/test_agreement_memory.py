"""What a rank says before a step leaves nothing behind."""

from __future__ import annotations

from hvd_sketch.exchange.agreement import Flag, Report, StepAgreement
from hvd_sketch.ledger import CommLedger
from hvd_sketch.transport import local_transports
from hvd_sketch.transport.metered import MeteredTransport


def test_no_flag_is_kept_for_every_step() -> None:
    """``enum`` keeps each value that a Flag ever had, those of other tests, too."""
    agreement = StepAgreement(1)
    comm = MeteredTransport(local_transports(1)[0], CommLedger())
    agreement.agree(comm, 0, Report(digest=1))
    kept = set(Flag._value2member_map_)
    for step in range(1, 100):
        agreement.agree(comm, step, Report(digest=step + 1))
    assert set(Flag._value2member_map_) == kept
