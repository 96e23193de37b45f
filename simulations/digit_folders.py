"""The embedded digits as people have images: PNG files in class directories."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from smi_fed.data import digits


def write_digits(directory: Path, classes: Iterable[str], count: int, first: int = 0) -> Path:
    """`count` digits of each of `classes` as 32 px grey PNGs in class directories, from the `first` on.

    Returns:
        The directory; it is made.
    """
    images, labels = digits()[0].images, digits()[0].labels
    for name in classes:
        (directory / name).mkdir(parents=True)
        for number, row in enumerate((labels == int(name)).nonzero()[first : first + count, 0].tolist()):
            pixels = (255 * images[row, 0]).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(directory / name / f"{number}.png")
    return directory
