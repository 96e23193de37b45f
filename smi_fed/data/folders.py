"""Images in a directory of class directories."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch

from smi_fed.checks import require
from smi_fed.data.config import DataConfig
from smi_fed.data.decoding import read_image
from smi_fed.data.images import ImageSet
from smi_fed.data.splits import HELD_OUT, check_split, matching, split

TRAIN = ("train", "training")


@dataclass(frozen=True)
class Listing:
    """What stands in a directory of class directories.

    Attributes:
        paths: of all images, class by class.
        labels: of each path, places in `class_names`.
        class_names: names of the class directories in their order.
    """

    paths: list[str]
    labels: list[int]
    class_names: tuple[str, ...]

    def read(self, config: DataConfig) -> ImageSet:
        """The images themselves."""
        images = torch.stack([read_image(path, config) for path in self.paths])
        return ImageSet(images, torch.tensor(self.labels), self.class_names)


def folder_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, test) from a directory.

    `name` holds class directories, or `train` with class directories and beside it, if there
    is one, `test`, `val` or another name of `HELD_OUT`. What has no held-out directory is
    split. Hidden files and directories do not count.

    Raises:
        FileNotFoundError: naming the directory.
        SettingError: classes without images, held-out classes that are not in train, or too
            few images to split.
        FileFormatError: naming an image that cannot be read.
    """
    root = Path(config.name).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.name: got {config.name!r}, allowed: a directory of class directories")
    train, held_out = layout(root)
    own = listing(train)
    counts = torch.bincount(torch.tensor(own.labels, dtype=torch.long), minlength=len(own.class_names))
    empty = [name for name, count in zip(own.class_names, counts.tolist(), strict=True) if not count]
    kinds = " ".join(extensions())
    require(len(own.class_names) > 0, "data.name", str(train), "a directory of class directories; there are none")
    require(not empty, "data.name", str(train), f"images ({kinds}) of each class; there are none of {empty}")
    if held_out is None:
        check_split(counts, own.class_names, config.test_fraction)  # before many images are read
        return split(own.read(config), config.test_fraction)
    other = listing(held_out)
    require(len(other.paths) > 0, "data.name", str(held_out), "class directories with images, as in train")
    used = sorted(set(other.labels))
    places = matching([other.class_names[label] for label in used], own.class_names, str(held_out))
    new = dict(zip(used, places, strict=True))
    other = Listing(other.paths, [new[label] for label in other.labels], own.class_names)
    return own.read(config), other.read(config)


def layout(root: Path) -> tuple[Path, Path | None]:
    """The directories of training and of held-out images; without the latter the former is to be split."""
    found = {path.name.lower(): path for path in directories(root)}
    train = next((found[name] for name in TRAIN if name in found), None)
    held_out = next((found[name] for name in HELD_OUT if name in found), None)
    if train is None:
        return root, None
    if held_out is None and (len(found) > 1 or not directories(train)):  # a class of trains
        return root, None
    return train, held_out


def listing(directory: Path) -> Listing:
    """The images below each class directory, at any depth, in the order of their names."""
    from torchvision.datasets.folder import make_dataset

    # macOS takes accents apart; models and other directories may name the same class in one piece.
    named = {path.name: unicodedata.normalize("NFC", path.name) for path in directories(directory)}
    names = tuple(sorted(set(named.values())))
    if not names:
        return Listing([], [], ())

    endings = extensions()

    def is_image(path: str) -> bool:
        inside = Path(path).relative_to(directory)
        return inside.suffix.lower() in endings and all(visible(part) for part in inside.parts)

    places = {name: names.index(own) for name, own in named.items()}
    found = make_dataset(os.fspath(directory), places, is_valid_file=is_image, allow_empty=True)
    return Listing([path for path, _ in found], [label for _, label in found], names)


def directories(parent: Path) -> list[Path]:
    """Directories that may be classes."""
    return sorted(path for path in parent.iterdir() if visible(path.name) and path.is_dir())


def visible(name: str) -> bool:
    """Whether a person put this there, and not a file manager, a notebook or an archive."""
    return not name.startswith(".") and name != "__MACOSX"


def extensions() -> tuple[str, ...]:
    """What counts as an image, in either case."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return (*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif")
