"""Do synthetic images show training images? Nearest training against nearest held-out neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, LUMINANCE, CONTRAST = 7, 0.01**2, 0.03**2
"""Pixels of a window, and constants of SSIM for images in [0, 1] (Wang et al., 2004)."""


@dataclass(frozen=True)
class Nearness:
    """How near synthetic images are to what a model was trained on, and to what it was not.

    Attributes:
        nearer: share of them whose nearest neighbour is a training image, where both are equally many; 0.5 is chance.
        training, held_out: mean similarity of the nearest; SSIM in [-1, 1], or the cosine of features.
    """

    nearer: float
    training: float
    held_out: float


def nearness(training: Tensor, held_out: Tensor) -> Nearness:
    """From similarities (m, n) of m synthetic images to training and to held-out ones; of both as many count."""
    count = min(training.shape[1], held_out.shape[1])
    own, other = (each[:, :count].max(1).values for each in (training, held_out))
    nearer = (own > other).double() + (own == other).double() / 2
    return Nearness(float(nearer.mean()), float(own.mean()), float(other.mean()))


def resemblance(similar: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """How much each example (n,) is like the synthetic image that is most like it, float64: of those with its label.

    Who has nothing but images can score membership so, and compare worlds. Of the scores that were tried on digits
    (also all images, the nearest ten, distances and kernels of pixels, and the certainty of a model that was trained
    on the images) it found canaries best.

    Args:
        similar: (m, n) of m images to n examples, at least -1, which stands where no image has the label.
        targets: (m,) classes that the images were made for.
        labels: (n,) of the examples.
    """
    return similar.double().where(targets[:, None] == labels, -1.0).max(0).values


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of every image of (m, c, h, w) to every one of (n, c, h, w), in [0, 1]: (m, n).

    With even windows, as the mean over windows and channels.
    """
    means, squares = zip(*(_moments(each) for each in (first, second)), strict=True)
    rows = []
    for place in range(len(first)):  # one row at a time, so that memory stays small
        together = _window_means(first[place] * second)
        a, b = means[0][place], means[1]
        covariance, spread = together - a * b, squares[0][place] - a**2 + squares[1] - b**2
        value = (2 * a * b + LUMINANCE) * (2 * covariance + CONTRAST)
        rows.append((value / ((a**2 + b**2 + LUMINANCE) * (spread + CONTRAST))).mean(1))
    return torch.stack(rows)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and mean squares of all windows (n, windows)."""
    return _window_means(images), _window_means(images**2)


def _window_means(images: Tensor) -> Tensor:
    """Means of all windows (n, windows) of (n, c, h, w), as products with bands: many times faster than pooling."""
    down, across = (_band(size).to(images) for size in images.shape[2:])
    return (down @ images @ across.T).flatten(1)


def _band(size: int) -> Tensor:
    """(windows, size): each row is the mean over one window."""
    first = torch.eye(size - WINDOW + 1, size, dtype=torch.float64)
    return torch.stack([first.roll(shift, 1) for shift in range(WINDOW)]).mean(0)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of every row of (m, d) with every row of (n, d): (m, n)."""
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
