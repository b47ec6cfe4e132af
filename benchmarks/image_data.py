"""Image data for the benchmarks: scikit-learn's digits (nothing to download) or MNIST's idx files."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Images:
    """Training and test images as float32 [n, features], standardised by the training set, and int64 labels [n]."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_images(data_dir: Path | None) -> Images:
    """MNIST from ``data_dir``, or scikit-learn's digits where it is None.

    Raises:
        FileNotFoundError: a file of MNIST is missing; the message names it and the official download.
    """
    return _load_digits() if data_dir is None else _load_mnist(data_dir)


def _load_digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # One fixed split: seeds vary the training, not the question.
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return _standardised("digits", train_images, train_labels, test_images, test_labels)


def _load_mnist(data_dir: Path) -> Images:
    arrays = [_read_idx(data_dir, name) for name in MNIST_FILES]
    train_images, train_labels, test_images, test_labels = arrays
    return _standardised("mnist", train_images, train_labels, test_images, test_labels)


def _read_idx(data_dir: Path, name: str) -> np.ndarray:
    """An idx file of bytes, gzipped or not: [n, ...]."""
    for path, opened in ((data_dir / f"{name}.gz", gzip.open), (data_dir / name, open)):
        if path.exists():
            with opened(path, "rb") as file:
                content = file.read()
            rank = content[3]
            shape = np.frombuffer(content, dtype=">i4", count=rank, offset=4)
            return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
    raise FileNotFoundError(
        f"{data_dir / name}[.gz] is missing: --data-dir needs the four idx files of MNIST, "
        f"{', '.join(MNIST_FILES)}, gzipped or not, from the MNIST database of Y. LeCun and others"
    )


def _standardised(name: str, *arrays: np.ndarray) -> Images:
    train_images, train_labels, test_images, test_labels = arrays
    train = torch.from_numpy(train_images.reshape(len(train_images), -1)).to(torch.float32)
    test = torch.from_numpy(test_images.reshape(len(test_images), -1)).to(torch.float32)
    mean, deviation = train.mean(), train.std()
    labels = [torch.from_numpy(labels.astype(np.int64)) for labels in (train_labels, test_labels)]
    return Images(name, (train - mean) / deviation, labels[0], (test - mean) / deviation, labels[1])
