"""Labelled images, in memory or decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smi_fed.checks import require
from smi_fed.data.decoding import resize
from smi_fed.data.lazy_images import LazyImages

Images = Tensor | LazyImages
"""(n, c, h, w): a tensor, or what stands for one; both have `[rows]`, `split(n)`, `to(device)`, `shape`, a length."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1]; `images[rows]` decodes where they are lazy.
        labels: (n,) int64, places in `class_names`.
        class_names: in the order of the labels.
        masks: (n, h, w) bool, the pixels of the object; None where nobody knows them.

    Raises:
        SettingError: parts that do not fit each other.
    """

    images: Images
    labels: Tensor
    class_names: tuple[str, ...]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        n, m = len(self.images), len(self.labels)
        require(self.images.ndim == 4 and n == m, "images", tuple(self.images.shape), f"(n, c, h, w) with {m} labels")
        wrong = self.labels[(self.labels < 0) | (self.labels >= len(self.class_names))]
        require(not len(wrong), "labels", wrong[:3].tolist(), f"0 to {len(self.class_names) - 1}, the classes' places")
        if self.masks is not None:
            shape = (n, *self.images.shape[2:])
            require(tuple(self.masks.shape) == shape, "masks", tuple(self.masks.shape), f"{shape}, like the images")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor | NDArray[np.int64] | list[int]) -> ImageSet:
        """The images at `indices`."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        masks = None if self.masks is None else self.masks[rows]
        images = self.images.select(rows) if isinstance(self.images, LazyImages) else self.images[rows]
        return ImageSet(images, self.labels[rows], self.class_names, masks)

    def loaded(self) -> ImageSet:
        """The same, in memory where it fits; see `LazyImages.loaded`."""
        return replace(self, images=self.images.loaded()) if isinstance(self.images, LazyImages) else self

    def resized(self, size: tuple[int, int]) -> ImageSet:
        """The same at (h, w), without masks, which are of the first size."""
        images = self.images.resized(size) if isinstance(self.images, LazyImages) else resize(self.images, size)
        return replace(self, images=images, masks=None)

    def of_classes(self, names: Sequence[str] | None) -> ImageSet:
        """The images of the classes `names`, labelled in that order; None is all.

        Raises:
            SettingError: a class that is not there.
        """
        if names is None or tuple(names) == self.class_names:
            return self
        unknown = [name for name in names if name not in self.class_names]
        require(not unknown, "class_names", unknown, f"the data's classes, {self.class_names}")
        places = torch.full((len(self.class_names),), -1)
        for place, name in enumerate(names):
            places[self.class_names.index(name)] = place
        labels = places[self.labels]
        chosen = self.select((labels >= 0).nonzero()[:, 0])
        return replace(chosen, labels=labels[labels >= 0], class_names=tuple(names))

    def labelled(self, names: Sequence[str]) -> ImageSet:
        """The same with labels that are places in `names`, which may have classes without images here.

        Raises:
            SettingError: images of a class that is not among `names`.
        """
        used = [self.class_names[label] for label in self.labels.unique().tolist()]
        unknown = [name for name in used if name not in names]
        require(not unknown, "class_names", unknown, f"the federation's classes, {', '.join(names)}")
        places = torch.tensor([names.index(name) if name in names else -1 for name in self.class_names])
        return replace(self, labels=places[self.labels], class_names=tuple(names))

    def label_counts(self) -> Tensor:
        """(classes,) int64, images per class."""
        return torch.bincount(self.labels, minlength=len(self.class_names))
