"""The largest values above a bound, found on a device: the host waits for it once."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_sketch.coding import device
from hvd_sketch.kernels.reference import MAGNITUDE_MASK
from hvd_sketch.transport.staging import to_host_together


def largest_above(positions: Tensor, values: Tensor, count: int) -> tuple[Tensor, int] | None:
    """The positions of the ``count`` largest magnitudes. Of equal magnitudes the lower positions are taken.

    Args:
        positions, values: int64 and float32 [n], on one device: the first n that are above a bound, in ascending
            order, with zeros behind them where there are fewer.
        count: from 1 to n.

    Returns:
        Positions, ascending, on the host where they are few, because they are coded there; and the magnitude bits of
        the least of the values. None where fewer than ``count`` are above the bound, or perhaps more than n.
    """
    magnitudes = values.view(torch.int32) & MAGNITUDE_MASK
    ordered, places = magnitudes.sort(descending=True, stable=True)
    chosen = positions.index_select(0, places[:count].sort().values)
    evidence = torch.stack([ordered[count - 1], magnitudes[-1]])
    if count <= device.FEW:
        evidence, chosen = to_host_together(evidence, chosen)
    least, last = evidence.tolist()
    return (chosen, least) if least and not last else None
