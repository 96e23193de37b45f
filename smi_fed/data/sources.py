"""The configured source of images."""

from __future__ import annotations

from smi_fed.checks import require
from smi_fed.data.config import DataConfig
from smi_fed.data.embedded import digits, shapes
from smi_fed.data.folders import folder_images
from smi_fed.data.hub import hub_images
from smi_fed.data.images import ImageSet


def load_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the configured source; the test split is the same for every seed.

    Raises:
        SettingError: a source that cannot be used; the message names the key under `data`.
        FileNotFoundError: a directory that is not there.
        FileFormatError: an image that cannot be read; the message names it.
    """
    if config.source == "digits":
        return digits(config.image_size, config.channels, config.test_fraction)
    if config.source == "shapes":
        return shapes(config.image_size, config.test_fraction)
    train, test = hub_images(config) if config.source == "hub" else folder_images(config)
    names = train.class_names
    require(len(names) > 1, "data.name", config.name, f"images of at least two classes; {names} is all there is")
    return train, test
