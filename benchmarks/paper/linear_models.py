"""Ten one-vs-all linear classifiers: losses, gradients, errors, and how low the loss can get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.image_data import Images

CLASSES = 10
CHUNK = 10_000  # images judged at once


@dataclass(frozen=True)
class Problem:
    """``mean_i loss(y_i <w, x_i>) + l2 / 2 ||w||^2`` for each class, y = +1 for the class and -1 for the others."""

    name: str
    loss: Callable[[Tensor], Tensor]  # of the margins, elementwise
    slope: Callable[[Tensor], Tensor]  # its derivative (a subgradient for the hinge)
    l2: float  # strong convexity; the bias is a weight like the others


LOGISTIC = Problem("logistic", lambda m: softplus(-m), lambda m: -torch.sigmoid(-m), l2=0.01)
SVM = Problem("svm", lambda m: (1 - m).clamp_(min=0), lambda m: -(m < 1).to(m.dtype), l2=0.0)


def smoothed_hinge(width: float) -> Problem:
    """The hinge with its corner rounded off from below: at most ``width / 2`` lower, so its minimum is too."""

    def loss(margin: Tensor) -> Tensor:
        lack = (1 - margin).clamp_(min=0)
        return torch.where(lack < width, lack.square() / (2 * width), lack - width / 2)

    return Problem("smoothed svm", loss, lambda m: -((1 - m) / width).clamp_(0, 1), l2=0.0)


@dataclass(frozen=True)
class Labelled:
    """Images with a constant 1 appended, float32 [n, dim], and labels, int64 [n]."""

    images: Tensor
    labels: Tensor

    def targets(self) -> Tensor:
        """+1 for the image's class, -1 for the others: float32 [n, CLASSES]."""
        return 2 * torch.nn.functional.one_hot(self.labels, CLASSES).to(torch.float32) - 1

    def select(self, index: Tensor | slice) -> Labelled:
        return Labelled(self.images[index], self.labels[index])


def with_bias(data: Images) -> tuple[Labelled, Labelled]:
    """Training and test set."""
    pairs = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    train, test = (Labelled(torch.nn.functional.pad(i, (0, 1), value=1.0), labels) for i, labels in pairs)
    return train, test


def gradient(problem: Problem, weights: Tensor, batch: Labelled) -> tuple[Tensor, float]:
    """Gradient float32 [CLASSES, dim] and loss, the mean over classes, of a batch."""
    targets = batch.targets()
    margins = targets * (batch.images @ weights.T)
    outer = targets * problem.slope(margins) / len(batch.labels)
    loss = float(problem.loss(margins).mean()) + _penalty(problem, weights)
    return (outer.T @ batch.images).add_(weights, alpha=problem.l2), loss


def judge(problem: Problem, weights: Tensor, data: Labelled) -> tuple[float, float]:
    """Objective, the mean over classes, and error: the fraction whose largest score is not their class's."""
    loss, wrong = 0.0, 0
    for start in range(0, len(data.labels), CHUNK):
        part = data.select(slice(start, start + CHUNK))
        scores = part.images @ weights.T
        loss += float(problem.loss(part.targets() * scores).sum(dtype=torch.float64))
        wrong += int((scores.argmax(1) != part.labels).sum())
    return loss / (CLASSES * len(data.labels)) + _penalty(problem, weights), wrong / len(data.labels)


def _penalty(problem: Problem, weights: Tensor) -> float:
    return problem.l2 / 2 * float(weights.square().sum(dtype=torch.float64)) / len(weights)


def lowest_loss(problem: Problem, train: Labelled, iterations: int) -> dict[str, float]:
    """How low the objective can get, by L-BFGS on the whole training set.

    Returns:
        ``reached``: the objective at the last iterate. ``least``: below or near the minimum: with l2 the bound
        ``f(w) - ||f'(w)||^2 / (2 l2)``; without, the smoothed hinge that was minimised, which lies below the hinge.
    """
    smooth = problem if problem.l2 else smoothed_hinge(0.01)
    weights = torch.zeros(CLASSES, train.images.shape[1], requires_grad=True)
    never = {"tolerance_grad": 0, "tolerance_change": 0}  # ends but after all iterations
    search = {"history_size": 30, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weights], max_iter=iterations, **search, **never)

    def closure() -> float:
        with torch.no_grad():
            weights.grad, loss = gradient(smooth, weights, train)
        return CLASSES * loss  # whose gradient it is

    optimizer.step(closure)
    final = weights.detach()
    slope, loss = gradient(smooth, final, train)
    slack = float(slope.square().sum()) / (2 * smooth.l2 * CLASSES) if smooth.l2 else 0.0
    return {"reached": judge(problem, final, train)[0], "least": loss - slack}
