"""Which images a run takes, and how clients share them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smi_fed.checks import Allowed, Count, Fraction, Positive, Text, checked, one_of, require

SOURCES = ("digits", "shapes", "hub", "folder", "manifest", "none")
EMBEDDED = ("digits", "shapes")
SCHEMES = ("iid", "dirichlet", "pathological")


@checked
class DataConfig:
    """Which images, and how they are divided.

    Args:
        source: digits (embedded) | shapes (embedded, with masks) | hub | folder | manifest (a CSV
            file) | none (a server without data, where each node has its own).
        name: hub data set, directory or CSV file; unused for what is embedded.
        split: of a hub data set, the split to take instead of its train split; "" takes that.
        nodes: a directory or CSV file for each client of a simulation, in the order of their partitions.
        image_size: pixels per side.
        channels: 1 | 3; 3 for shapes.
        test_fraction: share held out of what has no test split of its own, in [0, 1).
        image_column, label_column: of a hub data set or a CSV file.
        scheme: iid | dirichlet | pathological.
        alpha: Dirichlet's concentration, above 0.
        classes_per_partition: of the pathological scheme.
        background: grey under transparent pixels, from 0 (black) to 1 (white).
        memory: MiB. Images that need no more are decoded once; of others as many stay in memory.
        workers: threads that decode.

    Raises:
        SettingError: naming what cannot be.
    """

    source: Annotated[Text, one_of(SOURCES)] = "digits"
    name: Text = ""
    split: Text = ""
    nodes: tuple[Text, ...] = ()
    image_size: Annotated[int, Field(strict=True, ge=8), Allowed("an int >= 8")] = 32
    channels: Annotated[int, Field(strict=True), one_of((1, 3))] = 1
    test_fraction: Fraction = 0.25
    image_column: Text = "image"
    label_column: Text = "label"
    scheme: Annotated[Text, one_of(SCHEMES)] = "dirichlet"
    alpha: Positive = 0.5
    classes_per_partition: Count = 2
    background: Annotated[float, Field(strict=True, ge=0, le=1), Allowed("a number in [0, 1]")] = 1.0
    memory: Count = 256
    workers: Annotated[int, Field(strict=True, ge=1, le=256), Allowed("an int from 1 to 256")] = 2

    def __post_init__(self) -> None:
        needs = self.source not in (*EMBEDDED, "none")
        require(not needs or bool(self.name), "name", self.name, f"a name for source {self.source}")
        coloured = self.source == "shapes"
        require(not coloured or self.channels == 3, "channels", self.channels, "3, for source shapes")
        require(not self.split or self.source == "hub", "split", self.split, "none, but for source hub")
