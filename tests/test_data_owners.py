"""What an owner trains on and what it holds out."""

import datasets
import flwr_datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, ImageSet, LazyImages, hold_out, owned_images
from tests.test_data_folders import folder, paint
from tests.test_data_hub import dataset

FEDERATION = ("dog", "cat", "eel", "fox")


def numbered(labels):
    count = len(labels)
    return ImageSet(torch.arange(float(count)).view(count, 1, 1, 1), torch.tensor(labels), tuple("abcd"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0, 0.99))
def test_what_is_held_out_is_disjoint_the_same_each_time_and_a_share_of_each_class(labels, share):
    images = numbered(labels)
    train, held_out = hold_out(images, share)
    again = hold_out(images, share)[1]
    assert torch.equal(held_out.images, again.images)
    parts = train.images.flatten().tolist() + held_out.images.flatten().tolist()
    assert sorted(parts) == list(range(len(labels)))
    assert all(labels[int(place)] == label for each in (train, held_out)
               for place, label in zip(each.images.flatten(), each.labels.tolist(), strict=True))  # fmt: skip
    for all_, rest, held in zip(images.label_counts(), train.label_counts(), held_out.label_counts(), strict=True):
        assert int(rest) >= min(1, int(all_))
        assert int(held) == min(round(share * int(all_)), max(0, int(all_) - 1))


def test_nothing_is_held_out_where_nothing_is_asked_for():
    train, held_out = hold_out(numbered([0, 1, 1]), 0.0)
    assert (len(train), len(held_out)) == (3, 0)


def test_labels_are_the_federations_by_name(tmp_path):
    paint(tmp_path, {"cat": 2, "dog": 3, "empty": 0})
    train, held_out = owned_images(folder(tmp_path, test_fraction=0.34), FEDERATION)
    assert train.class_names == held_out.class_names == FEDERATION
    assert (train.label_counts().tolist(), held_out.label_counts().tolist()) == ([2, 1, 0, 0], [1, 1, 0, 0])
    for image, label in zip(train.loaded().images, train.labels.tolist(), strict=True):
        assert round(255 * float(image[0].mean())) == 100 * ["cat", "dog"].index(FEDERATION[label])


def test_an_owner_of_one_class(tmp_path):
    paint(tmp_path, {"eel": 4})
    train, _ = owned_images(folder(tmp_path, test_fraction=0.0), FEDERATION)
    assert train.labels.tolist() == [2] * 4
    assert isinstance(train.images, LazyImages)


def test_an_owners_test_directory_is_what_is_held_out(tmp_path):
    paint(tmp_path / "train", {"cat": 4, "dog": 3})
    paint(tmp_path / "test", {"dog": 2})
    train, held_out = owned_images(folder(tmp_path, test_fraction=0.5), FEDERATION)
    assert (train.label_counts().tolist(), held_out.label_counts().tolist()) == ([3, 4, 0, 0], [2, 0, 0, 0])


def test_a_class_of_its_own_is_named(tmp_path):
    paint(tmp_path, {"cat": 2, "yak": 1, "zebu": 1})
    with pytest.raises(
        SettingError, match="data: got .*the federation's classes, dog, cat, .*; it has images of yak, z"
    ):
        owned_images(folder(tmp_path), FEDERATION)


def test_parts_of_a_source_hold_out_of_their_own(tmp_path):
    paint(tmp_path, {"cat": 10, "dog": 10})
    config = folder(tmp_path, test_fraction=0.25, scheme="iid")
    parts = [owned_images(config, FEDERATION, (number, 2)) for number in range(2)]
    seen = [each.images.numbers.tolist() for part in parts for each in part]
    assert sorted(number for each in seen for number in each) == list(range(20))
    assert all(len(part[0]) + len(part[1]) == 10 for part in parts)
    with pytest.raises(SettingError, match="partition-id: got 2, allowed: 0 to 1"):
        owned_images(config, FEDERATION, (2, 2))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, of which each split is a hospital; and the rows that were decoded."""
    splits = {"mary": dataset([0, 1, 2] * 4), "north": dataset([2] * 5)}

    class FederatedDataset:
        def __init__(self, *, dataset, partitioners):
            assert dataset == "somebody/hospitals"

        def load_split(self, split):
            if split not in splits:
                raise ValueError(f"The given split: '{split}' is not present in the dataset's splits.")
            return splits[split]

    seen, decode = [], datasets.Image.decode_example
    monkeypatch.setattr(flwr_datasets, "FederatedDataset", FederatedDataset)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: seen.append(1) or decode(*a, **k))
    return seen


HUB = {"source": "hub", "name": "somebody/hospitals", "image_size": 8, "channels": 3}


def test_a_split_of_a_hub_data_set(hub):
    train, held_out = owned_images(DataConfig(**HUB, split="north", test_fraction=0.4), FEDERATION)
    assert (train.label_counts().tolist(), held_out.label_counts().tolist()) == ([0, 0, 3, 0], [0, 0, 2, 0])
    with pytest.raises(ValueError, match="'train' is not present"):
        owned_images(DataConfig(**HUB), FEDERATION)


def test_a_part_of_a_hub_data_set_decodes_its_own_rows_alone(hub):
    config = DataConfig(**HUB, split="mary", test_fraction=0.0, scheme="iid")
    train, _ = owned_images(config, FEDERATION, (1, 3))
    assert hub == []
    assert train.loaded().images.shape == (4, 3, 8, 8)
    assert len(hub) == 4
