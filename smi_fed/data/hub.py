"""Images of a hub data set, or of any `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smi_fed.checks import SettingError, require
from smi_fed.data.config import DataConfig
from smi_fed.data.decoding import naming, to_pixels
from smi_fed.data.images import ImageSet
from smi_fed.data.lazy_images import LazyImages
from smi_fed.data.splits import HELD_OUT, matching
from smi_fed.files import FileFormatError


def find_in_hub(config: DataConfig) -> tuple[ImageSet, ImageSet | None]:
    """(train, held out) of a hub data set through flwr-datasets; see `find_in_datasets`.

    `config.split` is taken instead of train and the held-out splits, if it is given.
    """
    from flwr_datasets import FederatedDataset

    federated = FederatedDataset(dataset=config.name, partitioners={})
    splits = {"train": federated.load_split(config.split or "train")}
    for name in () if config.split else HELD_OUT:
        with suppress(ValueError):  # flwr-datasets' answer where there is no such split
            splits[name] = federated.load_split(name)
            break
    return find_in_datasets(splits, config)


def find_in_datasets(splits: Mapping[str, Any], config: DataConfig) -> tuple[ImageSet, ImageSet | None]:
    """(train, held out) from `datasets.Dataset` splits, not yet decoded and not divided.

    Images may be an image column, bytes or paths. Labels may be a ClassLabel, integers from 0
    or strings, which are numbered in alphabetical order. Held-out images come from `test`, or
    else `val`, `validation` and so on.

    Raises:
        SettingError: a column that is not there or holds something else, or labels that are
            missing or beyond the classes.
    """
    require("train" in splits, "data.name", config.name, f"a data set with a train split, not only {list(splits)}")
    held_out = next((name for name in HELD_OUT if name in splits), None)
    train = _read(splits["train"], config.split or "train", config)
    return train, None if held_out is None else _read(splits[held_out], held_out, config, train.class_names)


def _read(rows: Any, where: str, config: DataConfig, class_names: tuple[str, ...] | None = None) -> ImageSet:
    """The images of a split, labelled in the order of `class_names` where it is given."""
    for key in ("image_column", "label_column"):
        column = getattr(config, key)
        require(column in rows.column_names, f"data.{key}", column, " | ".join(rows.column_names))
    require(len(rows) > 0, "data.name", config.name, f"images in {where}; there are none")
    labels, names = _labels(rows, where, config)
    if class_names is not None:
        used = sorted(set(labels))
        new = dict(zip(used, matching([names[label] for label in used], class_names, config.name), strict=True))
        labels, names = [new[label] for label in labels], class_names
    return ImageSet(_images(rows, where, config), torch.tensor(labels), names)


def _labels(rows: Any, where: str, config: DataConfig) -> tuple[list[int], tuple[str, ...]]:
    """Labels of a split and the names of its classes.

    Raises:
        SettingError: naming the first row whose label cannot be.
    """
    values = list(rows[config.label_column])
    names = getattr(rows.features[config.label_column], "names", None)
    if names is None and isinstance(values[0], str):
        _check_labels([isinstance(value, str) for value in values], values, where, config, "a string in each row")
        names = sorted(set(values))
        places = {name: place for place, name in enumerate(names)}
        return [places[value] for value in values], tuple(names)
    allowed = f"0 to {len(names) - 1}, one of its classes" if names else "integers from 0 or strings, one in each row"
    least_wrong = len(names) if names else float("inf")
    _check_labels(
        [isinstance(value, int) and 0 <= value < least_wrong for value in values], values, where, config, allowed
    )
    return [int(value) for value in values], tuple(names or map(str, range(int(max(values)) + 1)))


def _check_labels(right: list[bool], values: list[Any], where: str, config: DataConfig, allowed: str) -> None:
    if not all(right):
        row = right.index(False)
        found = f"{allowed}; row {row} of {where} has {values[row]!r}"
        raise SettingError("data.label_column", config.label_column, found)


def _images(rows: Any, where: str, config: DataConfig) -> LazyImages:
    """(n, c, h, w), whether the column holds images, their bytes or their paths."""
    from datasets import Image

    column = config.image_column
    feature = rows.features[column]
    try:
        decoded = rows.select_columns([column]).cast_column(column, Image(mode=getattr(feature, "mode", None)))
    except Exception as error:  # Arrow's and datasets' own kinds
        raise SettingError("data.image_column", column, f"images, their bytes or paths; it has {feature}") from error
    return LazyImages.of(Rows(decoded, where, config), config)


@dataclass(frozen=True)
class Rows:
    """Images of a data set's split."""

    rows: Any
    where: str
    config: DataConfig

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, number: int) -> Tensor:
        """See `Decoder`."""
        name = f"{self.config.name}, row {number} of {self.where}"
        with naming(name):
            image = self.rows[number][self.config.image_column]
            if image is None:
                raise FileFormatError(f"{name}: no image")
            return to_pixels(image, self.config, name)

    def check(self, number: int) -> None:
        """Nothing: a row cannot be looked at without all of it."""
