"""What is held out for the test, and under which labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from smi_fed.checks import require
from smi_fed.data.config import DataConfig
from smi_fed.data.images import ImageSet

SPLIT_SEED = 0
HELD_OUT = ("test", "testing", "val", "valid", "validation", "dev")
"""Names of a split or directory of held-out images; the first that is there is taken."""


def divided(train: ImageSet, held_out: ImageSet | None, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test): what was held out by whoever made the data, or else `split`'s share."""
    return split(train, config.test_fraction) if held_out is None else (train, held_out)


def split(images: ImageSet, test_fraction: float) -> tuple[ImageSet, ImageSet]:
    """(train, test) with the same share of each class, the same each time; with a share of 0 there is no test.

    Raises:
        SettingError: too few images for that.
    """
    from sklearn.model_selection import train_test_split

    if not test_fraction:
        return images, images.select([])
    check_split(images.label_counts(), images.class_names, test_fraction)
    train, test = train_test_split(
        np.arange(len(images)), test_size=test_fraction, stratify=images.labels.numpy(), random_state=SPLIT_SEED
    )
    return images.select(train), images.select(test)


def hold_out(images: ImageSet, test_fraction: float) -> tuple[ImageSet, ImageSet]:
    """(train, held out) of one owner's images: of each class about its share, the same each time.

    Unlike `split` it refuses nothing: a rare class keeps at least one image to train on.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    held = np.zeros(len(images), dtype=bool)
    for label in images.labels.unique().tolist():
        rows = np.flatnonzero(images.labels.numpy() == label)
        count = min(round(test_fraction * len(rows)), len(rows) - 1)
        held[generator.permutation(rows)[:count]] = True
    return images.select(np.flatnonzero(~held)), images.select(np.flatnonzero(held))


def check_split(counts: Tensor, names: Sequence[str], test_fraction: float) -> None:
    """Refuse what cannot be split by class.

    Args:
        counts: (classes,) int64, images of each class; classes without images do not count.

    Raises:
        SettingError: a class with one image, or a share that leaves fewer images than classes
            on one side.
    """
    images, classes = int(counts.sum()), int((counts > 0).sum())
    single = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 1]
    reason = "at least two images of each class, or a held-out split of its own"
    require(not single, "data.name", f"one image of {', '.join(single)}", reason)
    require(images > 0, "data.name", "no images", reason)
    least = math.ceil(1000 * classes / images) / 1000
    held = math.ceil(test_fraction * images)
    require(
        held >= classes and images - held >= classes, "data.test_fraction", test_fraction,
        f"{least} to {round(1 - least, 3)}: {images} images of {classes} classes, and each side needs {classes}",
    )  # fmt: skip


def matching(names: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """The place in `class_names` of each of `names`: held-out images keep their class, whatever its number.

    Raises:
        SettingError: names that the training images do not have.
    """
    places = {name: place for place, name in enumerate(class_names)}
    unknown = [name for name in names if name not in places]
    known = ", ".join(class_names)
    require(not unknown, "data.name", where, f"held-out images of train's classes, {known}; not of {unknown}")
    return [places[name] for name in names]
