"""CSV files that list images."""

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, load_images
from smi_fed.data.manifests import find_in_manifest
from smi_fed.files import FileFormatError


def manifest(path, text, **changes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    base = {"source": "manifest", "name": str(path), "image_size": 8, "channels": 1, "image_column": "path"}
    return DataConfig(**base | {"test_fraction": 0.5} | changes)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "scans").mkdir()
    for number in range(6):
        Image.fromarray(np.full((9, 9), 10_000 * number, np.uint16)).save(tmp_path / "scans" / f"{number}.png")
    return tmp_path


LABELS = ("ill", "well", "ill", "well", "ill", "well")
LINES = [f"scans/{number}.png,{label}" for number, label in enumerate(LABELS)]


def test_paths_and_labels(images):
    train, test = load_images(manifest(images / "list.csv", "\n".join(["path,label", *LINES])))
    assert train.class_names == test.class_names == ("ill", "well")
    assert (train.label_counts() + test.label_counts()).tolist() == [3, 3]
    for each in (train, test):
        for image, label in zip(each.images, each.labels, strict=True):
            number = round(65535 / 10_000 * float(image.mean()))
            assert LABELS[number] == each.class_names[label]
            torch.testing.assert_close(image, torch.full((1, 8, 8), 10_000 * number / 65535))


@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_write(images, sign, end):
    lines = [sign.join(('"patient, age"', "label", "path")), *(
        sign.join(("7", label, f'"scans/{number}.png"')) for number, label in enumerate(LABELS))]  # fmt: skip
    found, _ = find_in_manifest(manifest(images / "list.csv", b"\xef\xbb\xbf" + (end.join(lines) + end).encode()))
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert float(found.images[2].mean()) == pytest.approx(20_000 / 65535)


def test_other_columns_absolute_paths_and_numbers(images):
    lines = ["file,grade", *(f"{images}/scans/{number}.png,{number + 8}" for number in range(6))]
    config = manifest(images / "list.csv", "\n".join(lines), image_column="file", label_column="grade")
    found, held_out = find_in_manifest(config)
    assert held_out is None
    assert found.class_names == ("8", "9", "10", "11", "12", "13")
    assert found.labels.tolist() == list(range(6))


def test_a_split_column(images):
    lines = ["path,label,split", *(f"{line},{'test' if i > 3 else 'train'}" for i, line in enumerate(LINES))]
    train, test = load_images(manifest(images / "list.csv", "\n".join(lines)))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    lines[1] = f"{LINES[0]},mine"
    with pytest.raises(SettingError, match="train | test .*under split; line 2 has 'mine'"):
        load_images(manifest(images / "list.csv", "\n".join(lines)))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("path,kind\nscans/0.png,ill\n", SettingError, r"data.label_column: got 'label', allowed: path \| kind, the"),
        ("image,label\nscans/0.png,ill\n", SettingError, r"data.image_column: got 'path', allowed: image \| label"),
        ("path,label\n", SettingError, "data.name: got .*list.csv', allowed: a line for each image to train on"),
        ("", SettingError, "data.image_column: got 'path'"),
        ("path,label\nscans/0.png,ill\nscans/1.png,\n", SettingError, "path and label in each line; line 3 lacks one"),
        ("path,label\nscans/0.png\n", SettingError, "line 2 lacks one"),
        ("path,label\nscans/9.png,ill\nscans/8.png,ill\n", FileNotFoundError, "scans/9.png and 1 more: named in .*csv"),
        ("path,label\nscans,ill\n", FileNotFoundError, "scans: named in .*list.csv, but there is no such file"),
        (b"path,label\nscans/0.png,\xff\xfe\n", FileFormatError, "list.csv: not a CSV file in UTF-8"),
        ('path,label\n"scans/0.png,ill\n', FileFormatError, "list.csv: not a CSV file in UTF-8"),
    ],
)
def test_what_cannot_be_is_named(images, text, error, says):
    with pytest.raises(error, match=says):
        find_in_manifest(manifest(images / "list.csv", text))


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="data.name: got .*gone.csv', allowed: a CSV file with the columns path"
    ):
        load_images(DataConfig(source="manifest", name=str(tmp_path / "gone.csv")))


def test_a_listed_file_that_is_no_image(images):
    (images / "scans" / "3.png").write_text("no image")
    with pytest.raises(FileFormatError, match="scans/3.png: not a readable image"):
        load_images(manifest(images / "list.csv", "\n".join(["path,label", *LINES])))
