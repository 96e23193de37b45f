"""Data sets that need no file: digits and drawn shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from smi_fed.data.images import ImageSet
from smi_fed.data.splits import split
from smi_fed.shapes import CLASS_NAMES, draw_shapes

SHAPES_SEED = 0
SHAPES = 3000
"""Images of the embedded shapes, of ten classes in equal parts."""


@lru_cache(maxsize=2)
def digits(size: int = 32, channels: int = 1, test_fraction: float = 0.25) -> tuple[ImageSet, ImageSet]:
    """(train, test) of scikit-learn's 1797 handwritten digits, 8x8 grey, enlarged to `size`."""
    return split(all_digits(size, channels), test_fraction)


@lru_cache(maxsize=2)
def all_digits(size: int = 32, channels: int = 1) -> ImageSet:
    """`digits`, not divided."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).repeat(1, channels, 1, 1)
    return ImageSet(images, torch.tensor(data.target), tuple("0123456789"))


@lru_cache(maxsize=2)
def shapes(size: int = 32, test_fraction: float = 0.25) -> tuple[ImageSet, ImageSet]:
    """(train, test) of 3000 drawn objects, in colour and with masks, see `smi_fed.shapes`."""
    return split(all_shapes(size), test_fraction)


@lru_cache(maxsize=2)
def all_shapes(size: int = 32) -> ImageSet:
    """`shapes`, not divided."""
    labels = torch.arange(SHAPES) % len(CLASS_NAMES)
    images, masks = draw_shapes(labels, size, torch.Generator().manual_seed(SHAPES_SEED))
    return ImageSet(images, labels, CLASS_NAMES, masks)
