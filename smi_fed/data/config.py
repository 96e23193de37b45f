"""Which images a run takes, and how clients share them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smi_fed.checks import Allowed, Count, Positive, Share, Text, checked, one_of, require

SOURCES = ("digits", "shapes", "hub", "folder")
EMBEDDED = ("digits", "shapes")
SCHEMES = ("iid", "dirichlet", "pathological")


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
        background: grey under transparent pixels, from 0 (black) to 1 (white).

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
    background: Annotated[float, Field(strict=True, ge=0, le=1), Allowed("a number in [0, 1]")] = 1.0

    def __post_init__(self) -> None:
        require(self.source in EMBEDDED or bool(self.name), "name", self.name, f"a name for source {self.source}")
        coloured = self.source == "shapes"
        require(not coloured or self.channels == 3, "channels", self.channels, "3, for source shapes")
