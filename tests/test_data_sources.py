"""Folders and hub data sets."""

from dataclasses import replace

import datasets
import flwr_datasets
import pytest
import torch
from PIL import Image

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, folder_images, from_datasets, hub_images, load_images
from tests.test_data import rows

pytestmark = pytest.mark.filterwarnings("ignore:Classes.*will NOT be used")

LABELS = torch.arange(300) % 10


def paint(directory, counts, size=(10, 12)):
    """Class directories of one-coloured PNGs; the colour tells class and number."""
    for index, (name, count) in enumerate(counts.items()):
        (directory / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (100 * index, 10 * number, 255)).save(directory / name / f"{number}.png")


def folder(path, **changes):
    return DataConfig(**{"source": "folder", "name": str(path), "image_size": 8, "channels": 3, **changes})


def test_a_folder_with_train_and_test(tmp_path):
    paint(tmp_path / "train", {"cat": 3, "dog": 2})
    paint(tmp_path / "test", {"cat": 1, "dog": 2})
    train, test = load_images(folder(tmp_path))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.label_counts().tolist() == [3, 2]
    assert test.label_counts().tolist() == [1, 2]
    assert train.images.shape == (5, 3, 8, 8)
    for image, label in zip(train.images, train.labels, strict=True):
        torch.testing.assert_close(image[0], torch.full((8, 8), 100 * int(label) / 255))
        torch.testing.assert_close(image[2], torch.ones(8, 8))


def test_a_folder_that_is_split(tmp_path):
    paint(tmp_path, {"cat": 8, "dog": 4})
    train, test = folder_images(folder(tmp_path, test_fraction=0.25))
    assert train.label_counts().tolist() == [6, 3]
    assert test.label_counts().tolist() == [2, 1]
    assert len(set(rows(train, test))) == 12
    again = folder_images(folder(tmp_path, test_fraction=0.25))
    assert rows(again[1]) == rows(test)


def test_a_folder_in_grey(tmp_path):
    paint(tmp_path, {"cat": 4, "dog": 4})
    train, _ = folder_images(folder(tmp_path, channels=1, image_size=16))
    assert train.images.shape[1:] == (1, 16, 16)
    assert bool(((train.images >= 0) & (train.images <= 1)).all())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.name: got .*nowhere.*a directory of class directories"):
        folder_images(folder(tmp_path / "nowhere"))


def test_train_and_test_of_different_classes(tmp_path):
    paint(tmp_path / "train", {"cat": 2, "dog": 2})
    paint(tmp_path / "test", {"dog": 2})  # ImageFolder would call a dog 0 here and 1 above
    with pytest.raises(SettingError, match=r"name: got .*\('cat', 'dog'\).*\('dog',\)"):
        folder_images(folder(tmp_path))


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
    with pytest.raises(SettingError, match=rf"{key}: got 'colour', allowed: image \| label"):
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
