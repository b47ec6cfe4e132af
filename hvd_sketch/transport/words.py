"""What a rank says of itself to the others."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from enum import IntEnum

from hvd_sketch.transport.processes import NOBODY, Process


class Says(IntEnum):
    """What a word is about."""

    WAITS = 0  # in the collective that it has begun last
    ENDED = 1  # its program is over
    JOINED = 2  # it is in hvd.join()


@dataclass(frozen=True)
class Word:
    """What a rank has said last.

    Attributes:
        says: what it is about.
        begun: how many collectives it had begun by then.
        place: what it waits in, the last of them; "": it has not said.
        answers: how often it has answered those who wait for it since it has said that.
        process: the rank's.
    """

    says: Says
    begun: int
    place: str = ""
    answers: int = 0
    process: Process = NOBODY

    def encode(self) -> bytes:
        return json.dumps(astuple(self)).encode()

    @staticmethod
    def decode(data: bytes) -> Word:
        says, begun, place, answers, process = json.loads(data)
        return Word(Says(says), begun, place, answers, Process(*process))
