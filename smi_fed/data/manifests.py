"""Images that a CSV file lists."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import torch

from smi_fed.checks import SettingError, require
from smi_fed.data.config import DataConfig
from smi_fed.data.images import ImageSet
from smi_fed.data.lazy_images import Files, LazyImages
from smi_fed.data.splits import HELD_OUT, matching
from smi_fed.files import FileFormatError

PATH, LABEL, SPLIT = "path", "label", "split"
DELIMITERS = ",;\t"
ENDINGS = (".csv", ".tsv")

Row = tuple[str, str, str]
"""Path, label and split."""


def find_in_manifest(config: DataConfig) -> tuple[ImageSet, ImageSet | None]:
    """(train, held out) of the images in a CSV file, not yet decoded and not divided.

    The first line names the columns: `config.image_column` or else `path`, `config.label_column`
    or else `label`, and perhaps `split`, where `train` is to be trained on and a name of
    `HELD_OUT` is not. Columns stand between commas, semicolons or tabs. Relative paths start at
    the file's directory. Labels are names of classes.

    Raises:
        FileNotFoundError: naming the file, or the images that are not there.
        FileFormatError: no text of that form.
        SettingError: a column that is not there, or a line that lacks something; the line is named.
    """
    path = Path(config.name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.name: got {config.name!r}, allowed: a CSV file with the columns {PATH}, {LABEL}")
    rows = _rows(path, config)
    train = [row for row in rows if row[2] not in HELD_OUT]
    held_out = [row for row in rows if row[2] in HELD_OUT]
    require(len(train) > 0, "data.name", config.name, "a line for each image to train on; there is none")
    gone = [row[0] for row in rows if not Path(row[0]).is_file()]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise FileNotFoundError(f"{gone[0]}{more}: named in {path}, but there is no such file")
    names = ordered({label for _, label, _ in train})
    return _images(train, names, config), _images(held_out, names, config) if held_out else None


def ordered(names: set[str]) -> tuple[str, ...]:
    """By number where all are numbers, else by the alphabet."""
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def _images(rows: list[Row], names: tuple[str, ...], config: DataConfig) -> ImageSet:
    labels = torch.tensor(matching([label for _, label, _ in rows], names, config.name), dtype=torch.long)
    return ImageSet(LazyImages.of(Files([path for path, _, _ in rows], config), config), labels, names)


def _rows(path: Path, config: DataConfig) -> list[Row]:
    """Every line with whole paths."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            counts = Counter(file.readline())
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(DELIMITERS, key=lambda sign: counts[sign]), strict=True)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            image = _column("image_column", PATH, columns, config)
            label = _column("label_column", LABEL, columns, config)
            lines = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    return [_row(path, number, line, image, label) for number, line in lines]


def _column(key: str, usual: str, columns: list[str], config: DataConfig) -> str:
    column = getattr(config, key)
    found = next((name for name in (column, usual) if name in columns), None)
    require(found is not None, f"data.{key}", column, f"{' | '.join(columns)}, the columns of {config.name}")
    return str(found)


def _row(path: Path, number: int, line: dict[str, str | None], image: str, label: str) -> Row:
    file, name = ((line[key] or "").strip() for key in (image, label))
    if not file or not name:
        raise SettingError("data.name", os.fspath(path), f"{image} and {label} in each line; line {number} lacks one")
    kind = (line.get(SPLIT) or "train").strip().lower()
    allowed = f"train | {' | '.join(HELD_OUT)} under {SPLIT}; line {number} has {kind!r}"
    require(kind in ("train", "training", *HELD_OUT), "data.name", os.fspath(path), allowed)
    return os.fspath(path.parent / Path(file).expanduser()), name, kind
