"""What tests of ``hvd-sketch plan --measure`` run on every rank."""

from __future__ import annotations

import socket
from typing import Any

from hvd_sketch.commands.measure import links_of, probed
from hvd_sketch.transport import Transport


def measured(transport: Transport) -> dict[str, Any]:
    """Bandwidths of the job and of every link, by its ranks: bits per second."""
    links = {link.ranks: 8 * link.bytes_per_s for link in links_of(transport, socket.gethostname())}
    return {"job": 8 * probed(transport).bytes_per_s, "links": links}
