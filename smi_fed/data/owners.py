"""Images of one owner, who is asked by nobody else for them."""

from __future__ import annotations

from collections.abc import Sequence

from smi_fed.checks import SettingError, require
from smi_fed.data.config import DataConfig
from smi_fed.data.images import ImageSet
from smi_fed.data.partitions import partition
from smi_fed.data.sources import find_images
from smi_fed.data.splits import hold_out


def owned_images(
    config: DataConfig, classes: Sequence[str] | None, part: tuple[int, int] = (0, 1), seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """(train, held out) of an owner's images, not yet decoded.

    Held out is what the source itself holds out, or else `config.test_fraction` of each class,
    the same each time. An owner may have some of the classes only.

    Args:
        config: the owner's source.
        classes: of the federation, in the order of its labels; None takes the owner's.
        part: (number, of how many) where owners share a source; each holds out of its own part.
        seed: of how they share it.

    Raises:
        SettingError: images of a class that the federation does not know, no images, or no such part.
        FileNotFoundError: a directory or file that is not there.
    """
    train, held_out = find_images(config, every_class=False)
    number, parts = part
    require(number < parts, "partition-id", number, f"0 to {parts - 1}")
    if classes is not None:
        train = _labelled(train, classes, config)
        held_out = None if held_out is None else _labelled(held_out, classes, config)
    if parts > 1:
        train, held_out = train.select(partition(train.labels, config, parts, seed)[number]), None
    require(len(train) > 0, "data", config.name, "images to train on; there are none")
    return hold_out(train, config.test_fraction) if held_out is None else (train, held_out)


def _labelled(images: ImageSet, classes: Sequence[str], config: DataConfig) -> ImageSet:
    try:
        return images.labelled(classes)
    except SettingError as error:
        raise SettingError("data", config.name, f"{error.allowed}; it has images of {', '.join(error.got)}") from error
