"""Hub data sets."""

import io
from dataclasses import replace
from pathlib import Path

import datasets
import flwr_datasets
import numpy as np
import pytest
import torch
from PIL import Image

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, from_datasets, hub_images, load_images
from smi_fed.files import FileFormatError

pytestmark = pytest.mark.filterwarnings("ignore:Classes.*will NOT be used")


def dataset(labels, mode="RGB", names=("cat", "dog", "eel"), size=(12, 10), columns=("image", "label")):
    channels = len(Image.new(mode, (1, 1)).getbands())
    colour = [(40 * label, 90, 255)[:channels] for label in labels]
    images = [Image.new(mode, size, each if channels > 1 else each[0]) for each in colour]
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label})
    return datasets.Dataset.from_dict({columns[0]: images, columns[1]: list(labels)}, features=features)


HUB = DataConfig(source="hub", name="somebody/pets", image_size=8, channels=3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_dataset_in_colour_and_grey(mode, channels):
    splits = {"train": dataset([0, 1, 2, 1], mode), "test": dataset([2, 0], mode)}
    train, test = from_datasets(splits, replace(HUB, channels=channels))
    assert train.images.shape == (4, channels, 8, 8)
    assert train.labels.tolist() == [0, 1, 2, 1]
    assert test.labels.tolist() == [2, 0]
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    if mode == "L" or channels == 3:
        torch.testing.assert_close(train.images[2, 0], torch.full((8, 8), 80 / 255))


def test_a_dataset_without_names_or_test_split():
    splits = {"train": dataset([0, 1, 2] * 8, names=None, columns=("img", "y"))}
    train, test = from_datasets(splits, replace(HUB, image_column="img", label_column="y"))
    assert train.class_names == ("0", "1", "2")
    assert test.label_counts().tolist() == [2, 2, 2]
    assert len(train) == 18


@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_a_missing_column_is_named_beside_those_there(key):
    with pytest.raises(SettingError, match=rf"data.{key}: got 'colour', allowed: image \| label"):
        from_datasets({"train": dataset([0, 1])}, replace(HUB, **{key: "colour"}))


@pytest.fixture
def hub(monkeypatch):
    """Stands for flwr-datasets; a list of what it was asked for, and the splits it has."""
    asked, splits = [], {}

    class FederatedDataset:
        def __init__(self, *, dataset, partitioners):
            asked.append(dataset)
            assert partitioners == {}

        def load_split(self, split):
            if split not in splits:
                raise ValueError(f"The given split: '{split}' is not present in the dataset's splits: {list(splits)}.")
            asked.append(split)
            return splits[split]

    monkeypatch.setattr(flwr_datasets, "FederatedDataset", FederatedDataset)
    return asked, splits


def test_a_hub_data_set_comes_through_flwr_datasets(hub):
    asked, splits = hub
    splits.update(train=dataset([0, 1, 2]), test=dataset([1]))
    train, test = load_images(HUB)
    assert asked == ["somebody/pets", "train", "test"]
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [1]


def test_a_hub_data_set_without_a_test_split(hub):
    hub[1].update(train=dataset([0, 1, 2] * 8))
    train, test = hub_images(HUB)
    assert (len(train), len(test)) == (18, 6)


def test_a_hub_data_set_without_a_train_split(hub):
    hub[1].update(validation=dataset([0, 1, 2]))
    with pytest.raises(ValueError, match="'train' is not present"):
        hub_images(HUB)


def labelled(labels, feature=None, image=None):
    """Rows of which the labels may be anything that Arrow stores."""
    size = len(labels)
    images = [image or Image.new("RGB", (9, 9), (10 * row, 0, 0)) for row in range(size)]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    rows = rows.add_column("label", labels)
    if feature is not None:
        rows.info.features["label"] = (
            feature  # as a file's own metadata would: nobody has checked the labels against it
        )
    return rows


PETS = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("labels", "feature", "reason"),
    [
        ([0, 1, 2], PETS, "0 to 1, one of its classes; row 2 of train has 2"),
        ([0, -1, 1], PETS, "0 to 1, one of its classes; row 1 of train has -1"),
        ([0, 1, None], PETS, "row 2 of train has None"),
        ([-1, 1, 0], None, "integers from 0 or strings, one in each row; row 0 of train has -1"),
        ([0, None, 1], None, "row 1 of train has None"),
        ([0.5, 1.0, 2.0], None, "row 0 of train has 0.5"),
        ([[0], [1], [0, 1]], None, r"row 0 of train has \[0\]"),
        (["cat", None, "dog"], None, "a string in each row; row 1 of train has None"),
    ],
)
def test_labels_that_cannot_be_are_named_with_their_row(labels, feature, reason):
    with pytest.raises(SettingError, match=f"data.label_column: got 'label', allowed: .*{reason}"):
        from_datasets({"train": labelled(labels, feature)}, HUB)


def test_string_labels_are_numbered_by_name_in_both_splits():
    splits = {"train": labelled(["dog", "cat", "eel", "dog"]), "test": labelled(["eel", "dog"])}
    train, test = from_datasets(splits, HUB)
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 2, 1], [2, 1])


def test_booleans_are_two_classes():
    train, _ = from_datasets({"train": labelled([True, False]), "test": labelled([True])}, HUB)
    assert (train.labels.tolist(), train.class_names) == ([1, 0], ("0", "1"))


def test_held_out_labels_are_matched_by_name():
    other = datasets.ClassLabel(names=["dog", "fox", "cat"])
    train, test = from_datasets({"train": labelled([0, 1], PETS), "test": labelled([0, 2, 0], other)}, HUB)
    assert test.class_names == train.class_names == ("cat", "dog")
    assert test.labels.tolist() == [1, 0, 1]
    with pytest.raises(SettingError, match=r"data.name: got 'somebody/pets'.*cat, dog; not of \['fox'\]"):
        from_datasets({"train": labelled([0, 1], PETS), "test": labelled([0, 1], other)}, HUB)
    with pytest.raises(SettingError, match=r"train's classes, 0, 1, 2; not of \['3'\]"):
        from_datasets({"train": labelled([0, 1, 2]), "test": labelled([3, 0])}, HUB)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = [(51, 0, 0), (102, 0, 0)]


def stored(kind, tmp_path):
    """Rows whose images are not an image column."""
    data = [png(colour) for colour in COLOURS]
    paths = [str(tmp_path / f"{number} é.png") for number in range(2)]
    for path, each in zip(paths, data, strict=True):
        Path(path).write_bytes(each)
    column = {
        "bytes": data, "paths": paths, "both": [{"bytes": each, "path": "gone.png"} for each in data],
        "dictionaries": [{"bytes": None, "path": path} for path in paths],
    }.get(kind)  # fmt: skip
    rows = datasets.Dataset.from_dict({"image": column or paths, "label": [0, 1]})
    return rows.cast_column("image", datasets.Image(decode=False)) if kind == "undecoded" else rows


@pytest.mark.parametrize("kind", ["bytes", "paths", "both", "dictionaries", "undecoded"])
def test_images_as_bytes_or_paths(kind, tmp_path):
    rows = stored(kind, tmp_path)
    train, _ = from_datasets({"train": rows, "test": rows}, HUB)
    torch.testing.assert_close(train.images.mean((2, 3)), torch.tensor([[0.2, 0, 0], [0.4, 0, 0]]))


def test_a_column_of_something_else():
    rows = datasets.Dataset.from_dict({"image": [1.5, 2.5], "label": [0, 1]})
    with pytest.raises(
        SettingError, match="data.image_column: got 'image', allowed: images, their bytes or paths; it has"
    ):
        from_datasets({"train": rows}, HUB)


@pytest.mark.parametrize(
    ("image", "reason"),
    [(b"", "not a readable image"), (png((9, 9, 9))[:45], "not a readable image"), (None, "no image")],
    ids=["empty", "cut", "none"],
)
def test_an_image_that_cannot_be_read_is_named_by_its_row(image, reason):
    rows = datasets.Dataset.from_dict({"image": [png((1, 1, 1)), image], "label": [0, 1]})
    with pytest.raises(FileFormatError, match=f"somebody/pets, row 1 of test: {reason}"):
        from_datasets({"train": labelled([0, 1]), "test": rows}, HUB)


def test_sixteen_bits_of_a_hub_data_set():
    image = Image.fromarray(np.full((9, 9), 16384, np.uint16))
    train, _ = from_datasets({"train": labelled([0, 1], image=image), "test": labelled([0])}, HUB)
    torch.testing.assert_close(train.images, torch.full((2, 3, 8, 8), 16384 / 65535))


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_hub_data_set_with_validation_instead_of_test(hub, name):
    hub[1].update({"train": dataset([0, 1, 2]), name: dataset([1, 0])})
    train, test = hub_images(HUB)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [1, 0])


def test_test_comes_before_validation(hub):
    hub[1].update(train=dataset([0, 1, 2]), validation=dataset([1, 0]), test=dataset([2]))
    assert hub_images(HUB)[1].labels.tolist() == [2]


def test_splits_that_cannot_be_used():
    with pytest.raises(SettingError, match=r"data.name: got .*with a train split, not only \['test'\]"):
        from_datasets({"test": dataset([0])}, HUB)
    with pytest.raises(SettingError, match="data.name: got .*images in test; there are none"):
        from_datasets({"train": dataset([0, 1]), "test": dataset([0]).select([])}, HUB)
    with pytest.raises(SettingError, match="data.name: got 'one image of cat, dog'"):
        from_datasets({"train": dataset([0, 1])}, HUB)


def test_one_class_of_a_hub_data_set(hub):
    hub[1].update(train=dataset([0, 0], names=["cat"]), test=dataset([0], names=["cat"]))
    with pytest.raises(SettingError, match=r"data.name: got 'somebody/pets', allowed: images of at least two classes"):
        load_images(HUB)
