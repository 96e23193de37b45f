"""Images and how clients share them.

Nothing here needs a network but `hub_images`, which asks flwr-datasets for a hub data set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from smi_fed.checks import Allowed, Count, Positive, Share, Text, checked, is_integer, one_of, require
from smi_fed.shapes import CLASS_NAMES, draw_shapes

SOURCES = ("digits", "shapes", "hub", "folder")
EMBEDDED = ("digits", "shapes")
SCHEMES = ("iid", "dirichlet", "pathological")
SPLIT_SEED = 0
SHAPES_SEED = 0
SHAPES = 3000
"""Images of the embedded shapes, of ten classes in equal parts."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1].
        labels: (n,) int64.
        class_names: in the order of the labels.
        masks: (n, h, w) bool, the pixels of the object; None where nobody knows them.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        n, m = len(self.images), len(self.labels)
        require(self.images.ndim == 4 and n == m, "images", tuple(self.images.shape), f"(n, c, h, w) with {m} labels")
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


@checked
class DataConfig:
    """Which images, and how they are divided.

    Args:
        source: digits (embedded) | shapes (embedded, with masks) | hub | folder.
        name: hub data set or directory; unused for what is embedded.
        image_size: pixels per side.
        channels: 1 | 3; 3 for shapes.
        test_fraction: share held out of a source that has no test split, inside (0, 1).
        image_column, label_column: of a hub data set.
        scheme: iid | dirichlet | pathological.
        alpha: Dirichlet's concentration, above 0.
        classes_per_partition: of the pathological scheme.

    Raises:
        SettingError: naming what cannot be.
    """

    source: Annotated[Text, one_of(SOURCES)] = "digits"
    name: Text = ""
    image_size: Annotated[int, Field(strict=True, ge=8), Allowed("an int >= 8")] = 32
    channels: Annotated[int, Field(strict=True), one_of((1, 3))] = 1
    test_fraction: Share = 0.25
    image_column: Text = "image"
    label_column: Text = "label"
    scheme: Annotated[Text, one_of(SCHEMES)] = "dirichlet"
    alpha: Positive = 0.5
    classes_per_partition: Count = 2

    def __post_init__(self) -> None:
        require(self.source in EMBEDDED or bool(self.name), "name", self.name, f"a name for source {self.source}")
        coloured = self.source == "shapes"
        require(not coloured or self.channels == 3, "channels", self.channels, "3, for source shapes")


def load_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the configured source; the test split is the same for every seed."""
    if config.source == "digits":
        return digits(config.image_size, config.channels, config.test_fraction)
    if config.source == "shapes":
        return shapes(config.image_size, config.test_fraction)
    if config.source == "hub":
        return hub_images(config)
    return folder_images(config)


@lru_cache(maxsize=2)
def digits(size: int = 32, channels: int = 1, test_fraction: float = 0.25) -> tuple[ImageSet, ImageSet]:
    """(train, test) of scikit-learn's 1797 handwritten digits, 8x8 grey, enlarged to `size`."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).repeat(1, channels, 1, 1)
    return _split(ImageSet(images, torch.tensor(data.target), tuple("0123456789")), test_fraction)


@lru_cache(maxsize=2)
def shapes(size: int = 32, test_fraction: float = 0.25) -> tuple[ImageSet, ImageSet]:
    """(train, test) of 3000 drawn objects, in colour and with masks, see `smi_fed.shapes`."""
    labels = torch.arange(SHAPES) % len(CLASS_NAMES)
    images, masks = draw_shapes(labels, size, torch.Generator().manual_seed(SHAPES_SEED))
    return _split(ImageSet(images, labels, CLASS_NAMES, masks), test_fraction)


def _split(images: ImageSet, test_fraction: float) -> tuple[ImageSet, ImageSet]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(images)), test_size=test_fraction, stratify=images.labels.numpy(), random_state=SPLIT_SEED
    )
    return images.select(train), images.select(test)


def folder_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) from `name`/train and `name`/test, or from one folder that is split.

    Raises:
        FileNotFoundError: naming the directory.
        SettingError: train and test have different classes.
    """
    from torchvision.datasets import ImageFolder

    root = Path(config.name)
    if not root.is_dir():
        raise FileNotFoundError(f"data.name: got {config.name!r}, allowed: a directory of class directories")

    def read(directory: Path) -> ImageSet:
        folder = ImageFolder(os.fspath(directory))
        images = torch.stack([_to_tensor(image, config) for image, _ in folder])
        return ImageSet(images, torch.tensor(folder.targets), tuple(folder.classes))

    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = read(root / "train"), read(root / "test")
        same = train.class_names == test.class_names
        require(
            same, "name", config.name, f"the same classes in train, {train.class_names}, and test, {test.class_names}"
        )
        return train, test
    return _split(read(root), config.test_fraction)


def hub_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a hub data set, loaded through flwr-datasets."""
    from flwr_datasets import FederatedDataset

    federated = FederatedDataset(dataset=config.name, partitioners={})
    splits = {"train": federated.load_split("train")}
    with suppress(ValueError):  # flwr-datasets' answer where there is no test split
        splits["test"] = federated.load_split("test")
    return from_datasets(splits, config)


def from_datasets(splits: Mapping[str, Any], config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) from `datasets.Dataset` splits; without a test split the train split is divided.

    Raises:
        SettingError: a column that is not there.
    """

    def read(split: Any) -> ImageSet:
        for key in ("image_column", "label_column"):
            column = getattr(config, key)
            require(column in split.column_names, key, column, " | ".join(split.column_names))
        images = torch.stack([_to_tensor(image, config) for image in split[config.image_column]])
        labels = torch.tensor(split[config.label_column])
        names = getattr(split.features[config.label_column], "names", None)
        names = names or [str(label) for label in range(int(labels.max()) + 1)]
        return ImageSet(images, labels, tuple(names))

    if "test" in splits:
        return read(splits["train"]), read(splits["test"])
    return _split(read(splits["train"]), config.test_fraction)


def _to_tensor(image: Any, config: DataConfig) -> Tensor:
    """A PIL image as float32 (c, h, w) in [0, 1] of the configured size."""
    from torchvision.transforms.functional import pil_to_tensor

    pixels = pil_to_tensor(image.convert("L" if config.channels == 1 else "RGB")).float() / 255
    size = (config.image_size, config.image_size)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def partition(labels: Tensor, config: DataConfig, partitions: int, seed: int) -> list[NDArray[np.int64]]:
    """Indices of each partition, by flwr-datasets' partitioners; some may be empty.

    Raises:
        SettingError: fewer than one partition, or more classes per partition than there are.
    """
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner

    require(is_integer(partitions) and partitions > 0, "partitions", partitions, "an int >= 1")
    if config.scheme == "iid":
        partitioner: Any = IidPartitioner(partitions)
    elif config.scheme == "dirichlet":
        partitioner = DirichletPartitioner(
            partitions, "label", config.alpha, min_partition_size=0, self_balancing=True, seed=seed
        )
    else:
        classes, wanted = len(labels.unique()), config.classes_per_partition
        require(wanted <= classes, "classes_per_partition", wanted, f"at most the {classes} classes")
        partitioner = PathologicalPartitioner(
            partitions, "label", wanted, class_assignment_mode="deterministic", shuffle=True, seed=seed
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"index": order, "label": labels.numpy()[order]})
    parts = [partitioner.load_partition(i) for i in range(partitions)]
    return [np.array(part["index"], dtype=np.int64) for part in parts]
