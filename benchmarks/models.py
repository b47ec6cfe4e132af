"""The models that the benchmarks train. None keeps statistics of its batches: all ranks hold one model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # from the number of channels
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
    """With group instead of batch norm: 6.6 M parameters at 64 ``hidden`` channels."""
    shape = SHAPES[features]
    return nn.Sequential(
        nn.Unflatten(1, shape), resnet9_features(shape[0], hidden, _group_norm), nn.Linear(8 * hidden, 10)
    )


def resnet9_features(channels: int, width: int, norm: Norm) -> nn.Sequential:
    """All of Page's ResNet-9 (2018) but its head: from images [n, channels, rows, cols] to [n, 8 * width]."""
    w = width
    return nn.Sequential(
        _convolution(channels, w, norm),
        *(_convolution(w, 2 * w, norm), nn.MaxPool2d(2), _residual(2 * w, norm)),
        *(_convolution(2 * w, 4 * w, norm), nn.MaxPool2d(2)),
        *(_convolution(4 * w, 8 * w, norm), nn.MaxPool2d(2), _residual(8 * w, norm)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    )


class Residual(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return images + super().forward(images)


def _residual(channels: int, norm: Norm) -> nn.Module:
    return Residual(_convolution(channels, channels, norm), _convolution(channels, channels, norm))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // 16), channels)


def _convolution(inputs: int, outputs: int, norm: Norm = _group_norm) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU())


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet9": resnet9}
