"""Which images a run takes, and how clients share them."""

from __future__ import annotations

from dataclasses import dataclass

from smi_fed.checks import is_integer, is_number, require, require_choice

SOURCES = ("digits", "shapes", "hub", "folder")
EMBEDDED = ("digits", "shapes")
SCHEMES = ("iid", "dirichlet", "pathological")


@dataclass(frozen=True)
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
        background: grey under transparent pixels, from 0 (black) to 1 (white).

    Raises:
        SettingError: naming what cannot be.
    """

    source: str = "digits"
    name: str = ""
    image_size: int = 32
    channels: int = 1
    test_fraction: float = 0.25
    image_column: str = "image"
    label_column: str = "label"
    scheme: str = "dirichlet"
    alpha: float = 0.5
    classes_per_partition: int = 2
    background: float = 1.0

    def __post_init__(self) -> None:
        require_choice("source", self.source, SOURCES)
        require_choice("scheme", self.scheme, SCHEMES)
        require(self.source in EMBEDDED or bool(self.name), "name", self.name, f"a name for source {self.source}")
        size = self.image_size
        require(is_integer(size) and size >= 8, "image_size", size, "an int >= 8")
        require(self.channels in (1, 3), "channels", self.channels, "1 | 3")
        coloured = self.source == "shapes"
        require(not coloured or self.channels == 3, "channels", self.channels, "3, for source shapes")
        fraction = self.test_fraction
        require(is_number(fraction) and 0 < fraction < 1, "test_fraction", fraction, "a number inside (0, 1)")
        require(is_number(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a number > 0")
        classes = self.classes_per_partition
        require(is_integer(classes) and classes > 0, "classes_per_partition", classes, "an int >= 1")
        grey = self.background
        require(is_number(grey) and 0 <= grey <= 1, "background", grey, "a number in [0, 1]")
