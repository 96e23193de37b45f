"""Images in a directory of class directories."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch

from smi_fed.checks import require
from smi_fed.data.config import DataConfig
from smi_fed.data.decoding import DICOM
from smi_fed.data.images import ImageSet
from smi_fed.data.lazy_images import Files, LazyImages
from smi_fed.data.splits import HELD_OUT, matching

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

    def images(self, config: DataConfig) -> ImageSet:
        """The images, not yet decoded."""
        return ImageSet(LazyImages.of(Files(self.paths, config), config), torch.tensor(self.labels), self.class_names)


def find_in_folder(config: DataConfig, every_class: bool = True) -> tuple[ImageSet, ImageSet | None]:
    """(train, held out) of a directory, not yet decoded and not divided.

    `name` holds class directories, or `train` with class directories and beside it, if there
    is one, `test`, `val` or another name of `HELD_OUT`. Hidden files and directories do not
    count.

    Args:
        every_class: refuse class directories without images.

    Raises:
        FileNotFoundError: naming the directory.
        SettingError: no classes, classes without images, or held-out classes that are not in train.
    """
    root = Path(config.name).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.name: got {config.name!r}, allowed: a directory of class directories")
    train, held_out = layout(root)
    own = listing(train)
    used = {own.class_names[label] for label in own.labels}
    empty = [name for name in own.class_names if name not in used]
    kinds = " ".join(extensions())
    require(len(own.class_names) > 0, "data.name", str(train), "a directory of class directories; there are none")
    allowed = f"images ({kinds}) of each class; there are none of {empty}"
    require(bool(used) and not (every_class and empty), "data.name", str(train), allowed)
    if held_out is None:
        return own.images(config), None
    other = listing(held_out)
    require(len(other.paths) > 0, "data.name", str(held_out), "class directories with images, as in train")
    there = sorted(set(other.labels))
    places = matching([other.class_names[label] for label in there], own.class_names, str(held_out))
    new = dict(zip(there, places, strict=True))
    other = Listing(other.paths, [new[label] for label in other.labels], own.class_names)
    return own.images(config), other.images(config)


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

    return (*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif", *DICOM)
