"""Labelled images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smi_fed.checks import require


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1].
        labels: (n,) int64, places in `class_names`.
        class_names: in the order of the labels.
        masks: (n, h, w) bool, the pixels of the object; None where nobody knows them.

    Raises:
        SettingError: parts that do not fit each other.
    """

    images: Tensor
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
        return ImageSet(self.images[rows], self.labels[rows], self.class_names, masks)

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

    def label_counts(self) -> Tensor:
        """(classes,) int64, images per class."""
        return torch.bincount(self.labels, minlength=len(self.class_names))
