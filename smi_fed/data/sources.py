"""The configured source of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smi_fed.checks import require
from smi_fed.data.config import DataConfig
from smi_fed.data.embedded import all_digits, all_shapes, digits, shapes
from smi_fed.data.folders import find_in_folder
from smi_fed.data.hub import find_in_datasets, find_in_hub
from smi_fed.data.images import ImageSet
from smi_fed.data.manifests import find_in_manifest
from smi_fed.data.splits import divided


def find_images(config: DataConfig, every_class: bool = True) -> tuple[ImageSet, ImageSet | None]:
    """(train, held out) of the configured source, not yet decoded and not divided.

    Args:
        every_class: refuse a folder that has a class directory without images.

    Raises:
        SettingError: a source that cannot be used; the message names the key under `data`.
        FileNotFoundError: a directory or file that is not there.
    """
    if config.source == "digits":
        return all_digits(config.image_size, config.channels), None
    if config.source == "shapes":
        return all_shapes(config.image_size), None
    if config.source == "hub":
        return find_in_hub(config)
    if config.source == "manifest":
        return find_in_manifest(config)
    require(config.source == "folder", "data.source", config.source, "a source that has images")
    return find_in_folder(config, every_class)


def shared_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) of what server and clients share, not yet decoded; the test split is the same for every seed.

    Raises:
        SettingError: a source that cannot be used, or too few images to divide.
        FileNotFoundError: a directory or file that is not there.
    """
    if config.source == "digits":
        return digits(config.image_size, config.channels, config.test_fraction)
    if config.source == "shapes":
        return shapes(config.image_size, config.test_fraction)
    found, held_out = find_images(config)
    names = found.class_names
    require(len(names) > 1, "data.name", config.name, f"images of at least two classes; {names} is all there is")
    return divided(found, held_out, config)


def load_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """`shared_images`, in memory where they fit it.

    Raises:
        FileFormatError: an image that cannot be read; the message names it.
    """
    return _loaded(shared_images(config))


def folder_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) from a directory, see `find_in_folder`; what has no held-out directory is split."""
    return _loaded(divided(*find_in_folder(config), config))


def hub_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a hub data set, see `find_in_hub`."""
    return _loaded(divided(*find_in_hub(config), config))


def from_datasets(splits: Mapping[str, Any], config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) from `datasets.Dataset` splits, see `find_in_datasets`."""
    return _loaded(divided(*find_in_datasets(splits, config), config))


def _loaded(sets: tuple[ImageSet, ImageSet]) -> tuple[ImageSet, ImageSet]:
    return sets[0].loaded(), sets[1].loaded()
