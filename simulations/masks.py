"""How well a choice of patches finds an object whose mask is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from smi_fed.data import ImageSet
from smi_fed.inversion.selections import best
from smi_fed.tokens import to_patches

WHITE = 0.94
"""A pixel of a picture on a white ground is drawn where a channel is below this: WebP leaves the ground above it.

White parts at an edge that no line closes are taken for ground, and a picture that fills its frame is all object.
"""


def drawn(images: Tensor) -> Tensor:
    """Masks (n, h, w) bool of what is drawn on a white ground (n, c, h, w) in [0, 1], with what its lines enclose."""
    lines = (images.amin(1) < WHITE).cpu().numpy()
    found = np.zeros_like(lines)
    for each, filled in zip(lines, found, strict=True):
        binary_fill_holes(each, output=filled)
    return torch.from_numpy(found)


def masked(images: ImageSet) -> ImageSet:
    """The same with masks, in memory; images without masks of their own are pictures on a white ground."""
    if images.masks is not None:
        return images
    pixels = images.images[torch.arange(len(images))]
    return replace(images, images=pixels, masks=drawn(pixels))


def coverage(masks: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Share (n, patches) of each patch that is in the mask (n, h, w)."""
    return to_patches(masks[:, None].float(), patch_size).mean((2, 3, 4))


def kept(scores: Tensor, count: int) -> Tensor:
    """Which patches (n, patches) bool are the `count` best of each image."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best(scores, count), value=True)


def iou(kept: Tensor, covered: Tensor) -> float:
    """Mean over images of the pixels that patches and mask share over those of either.

    Args:
        kept: (n, patches) bool.
        covered: (n, patches), see `coverage`; no image without an object and without a patch.
    """
    both = (kept * covered).sum(1)
    return float((both / (kept.sum(1) + covered.sum(1) - both)).mean())


def pointing(scores: Tensor, covered: Tensor) -> float:
    """Share of images of whose best patch at least half is the object (n, patches)."""
    return float((covered.gather(1, scores.argmax(1, keepdim=True)) >= 0.5).float().mean())
