"""ResNet-9 of the DAWNBench winner for CIFAR-10 (Page 2018), with batch norm, and its data augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models import resnet9_features

SIDE = 32
PAD, CUTOUT = 4, 8
LOGITS_SCALE = 0.125
NORM_BATCH = 500  # images at once when statistics are made anew


class ResNet9(nn.Module):
    """6.6 M parameters at ``width`` 64; takes float32 [n, 3, 32, 32], gives logits [n, 10].

    In training every batch is normalised by its own statistics, and none are kept: :meth:`set_statistics` makes those
    for evaluation, a function of weights and images alone, so that workers need not agree on them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = resnet9_features(3, width, partial(nn.BatchNorm2d, momentum=0.0))
        self.head = nn.Linear(8 * width, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)) * LOGITS_SCALE

    @torch.no_grad()
    def set_statistics(self, images: Tensor) -> None:
        """Mean and variance of every batch norm for evaluation: averages over ``images``, float32 [n, 3, 32, 32]."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over batches
        self.train()
        for batch in images.split(NORM_BATCH):
            self(batch)
        for norm in norms:
            norm.momentum = 0.0  # training leaves them as they are


@dataclass(frozen=True)
class Augmentation:
    """How each of n images is changed: drawn on the CPU, so that it is the same on every device."""

    shifts: Tensor  # int64 [n, 2], rows and columns that the window is moved by, from -PAD to PAD
    flips: Tensor  # bool [n], left to right
    cuts: Tensor  # int64 [n, 2], top left corner of the square that is set to zero

    @staticmethod
    def draw(draw: np.random.Generator, images: int) -> Augmentation:
        shifts = torch.from_numpy(draw.integers(-PAD, PAD + 1, (images, 2)))
        flips = torch.from_numpy(draw.integers(0, 2, images).astype(bool))
        return Augmentation(shifts, flips, torch.from_numpy(draw.integers(0, SIDE - CUTOUT + 1, (images, 2))))

    def part(self, start: int, stop: int) -> Augmentation:
        return Augmentation(self.shifts[start:stop], self.flips[start:stop], self.cuts[start:stop])

    def apply(self, images: Tensor, index: Tensor) -> Tensor:
        """``images[index]`` (from [N, 3, 32, 32]), padded by reflection, cropped, flipped and cut: [n, 3, 32, 32]."""
        device = images.device
        shifts, flips, cuts = (t.to(device) for t in (self.shifts, self.flips, self.cuts))
        lane = torch.arange(SIDE, device=device)
        rows = _reflect(lane + shifts[:, :1])
        cols = _reflect(lane + shifts[:, 1:])
        cols = torch.where(flips[:, None], cols.flip(1), cols)
        # Indices on both sides of the colours put these last.
        taken = images[index.to(device)[:, None, None], :, rows[:, :, None], cols[:, None, :]]
        is_cut_row, is_cut_col = ((lane >= c) & (lane < c + CUTOUT) for c in (cuts[:, :1], cuts[:, 1:]))
        taken.masked_fill_((is_cut_row[:, :, None] & is_cut_col[:, None, :])[..., None], 0)
        return taken.permute(0, 3, 1, 2).contiguous()


def _reflect(position: Tensor) -> Tensor:
    """Positions outside the image mirrored at its edge pixels."""
    return (SIDE - 1) - ((SIDE - 1) - position.abs()).abs()
