"""Inner optimizers for exchanges that send a few coordinates at a time."""

from hvd_sketch.optim.lag_adamw import LagAdamW

__all__ = ["LagAdamW"]
