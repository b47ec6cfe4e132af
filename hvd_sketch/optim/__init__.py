"""Inner optimizers for exchanges that send a few coordinates at a time."""

from hvd_sketch.optim.lag_adamw import LagAdamW
from hvd_sketch.optim.sign_sgd import SignSGD

__all__ = ["LagAdamW", "SignSGD"]
