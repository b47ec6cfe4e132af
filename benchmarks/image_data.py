"""Image data for the benchmarks: scikit-learn's digits (nothing to download), MNIST or CIFAR-10."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then red, green and blue


@dataclass(frozen=True)
class Images:
    """Training and test images as float32 [n, features], standardised by the training set, and int64 labels [n]."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Images:
        return replace(self, **{name: part.to(device) for name, part in vars(self).items() if name != "name"})


def load_images(data_dir: Path | None) -> Images:
    """What lies in ``data_dir``, CIFAR-10 (its binary version) or MNIST, or scikit-learn's digits where it is None.

    Raises:
        FileNotFoundError: a file is missing; the message names it and the official download.
    """
    if data_dir is None:
        return _load_digits()
    return load_cifar10(data_dir) if (data_dir / "data_batch_1.bin").exists() else load_mnist(data_dir)


def hold_out(data: Images) -> Images:
    """The training set alone, a tenth of it in place of the test set: it judges learning rates."""
    judges = torch.arange(len(data.train_labels)) % 10 == 0
    images, labels = data.train_images, data.train_labels
    return Images(data.name, images[~judges], labels[~judges], images[judges], labels[judges])


def _load_digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # One fixed split: seeds vary the training, not the question.
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return _standardised("digits", train_images, train_labels, test_images, test_labels)


def load_mnist(data_dir: Path) -> Images:
    """As :func:`load_images`, of MNIST."""
    return _standardised("mnist", *read_mnist(data_dir))


def load_cifar10(data_dir: Path) -> Images:
    """As :func:`load_images`, of CIFAR-10."""
    return _standardised("cifar10", *read_cifar10(data_dir))


def read_mnist(data_dir: Path) -> list[np.ndarray]:
    """MNIST as its files have it, uint8: training images [n, 28, 28] and labels [n], test images and labels."""
    return [_read_idx(data_dir, name) for name in MNIST_FILES]


def read_cifar10(data_dir: Path) -> list[np.ndarray]:
    """CIFAR-10 as its files have it, uint8: training images [n, 3072] and labels [n], test images and labels."""
    train = np.concatenate([_read_cifar10(data_dir / f"data_batch_{number}.bin") for number in range(1, 6)])
    test = _read_cifar10(next(iter(sorted(data_dir.glob("test_batch*.bin"))), data_dir / "test_batch.bin"))
    return [train[:, 1:], train[:, 0], test[:, 1:], test[:, 0]]


def _read_cifar10(path: Path) -> np.ndarray:
    """uint8 [n, 3073]."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: --data-dir needs data_batch_1 to 5 and test_batch of CIFAR-10's binary version, "
            "from the CIFAR-10 page of A. Krizhevsky"
        )
    return np.fromfile(path, dtype=np.uint8).reshape(-1, CIFAR_RECORD_BYTES)


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
    train, test = (
        torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)) for images in (train_images, test_images)
    )
    mean, deviation = train.mean(), train.std()
    labels = [torch.from_numpy(labels.astype(np.int64)) for labels in (train_labels, test_labels)]
    return Images(name, (train - mean) / deviation, labels[0], (test - mean) / deviation, labels[1])
