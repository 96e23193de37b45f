"""Random views of training images, by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

Augmentation = Literal["none", "standard", "randaugment"]

SMALLEST_CROP = 0.5
"""Share of an image's area; smaller crops of a picture with one small object often miss it."""
COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
GREY = 0.5


def augmentation(kind: Augmentation) -> Callable[[Tensor], Tensor]:
    """Images (b, c, h, w) in [0, 1] to random views of the same shape, each image with draws of its own.

    Args:
        kind: none | standard (a random crop, resized; a mirror image; brightness, contrast and
            colour) | randaugment (the crop and the mirror image, then two of RandAugment's
            operations, Cubuk et al., 2020).

    The draws are torch's own: see `smi_fed.training.seeded_torch`.
    """
    if kind == "none":
        return lambda images: images
    last = v2.ColorJitter(**COLOUR) if kind == "standard" else v2.RandAugment(fill=GREY)  # type: ignore[arg-type]

    def views(images: Tensor) -> Tensor:
        size = [int(side) for side in images.shape[-2:]]
        change = v2.Compose([v2.RandomResizedCrop(size, scale=(SMALLEST_CROP, 1)), v2.RandomHorizontalFlip(), last])
        # A transform draws once for all that it is given.
        return torch.stack([change(image) for image in images]).clamp(0, 1)

    return views
