"""The models that the benchmarks train. None keeps statistics of its batches: all ranks hold one model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

SHAPES = {64: (1, 8, 8), 784: (1, 28, 28), 3072: (3, 32, 32)}  # of images, by their number of features


def mlp(features: int, hidden: int) -> nn.Module:
    """Two hidden layers."""
    layers = [layer for pair in pairwise((features, hidden, hidden)) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def cnn(features: int, hidden: int) -> nn.Module:
    """Two convolutions and one hidden layer."""
    shape = SHAPES[features]
    convolutions = [_convolution(shape[0], 32), nn.MaxPool2d(2), _convolution(32, 64), nn.AdaptiveMaxPool2d(7)]
    return nn.Sequential(
        nn.Unflatten(1, shape),
        *convolutions,
        nn.Flatten(),
        nn.Linear(64 * 49, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def resnet9(features: int, hidden: int) -> nn.Module:
    """Page's ResNet-9 with group instead of batch norm: 6.6 M parameters at 64 ``hidden`` channels."""
    first = hidden
    widened = [_convolution(first * 2**i, first * 2 ** (i + 1)) for i in range(3)]
    return nn.Sequential(
        nn.Unflatten(1, SHAPES[features]),
        _convolution(SHAPES[features][0], first),
        *(widened[0], nn.MaxPool2d(2), Residual(2 * first)),
        *(widened[1], nn.MaxPool2d(2)),
        *(widened[2], nn.MaxPool2d(2), Residual(8 * first)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * first, 10)),
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.inner(images)


def _convolution(inputs: int, outputs: int) -> nn.Module:
    groups = max(1, outputs // 16)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(groups, outputs), nn.ReLU())


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet9": resnet9}
