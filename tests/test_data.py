from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, ImageSet, digits, partition

pytestmark = pytest.mark.filterwarnings("ignore:Classes.*will NOT be used")

LABELS = torch.arange(300) % 10


def rows(*sets):
    """The images as a sorted list of bytes, to compare sets with repetitions."""
    return sorted(image.numpy().tobytes() for each in sets for image in each.images)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3)])
def test_digits(size, channels):
    train, test = digits(size, channels)
    for each, count in ((train, 1347), (test, 450)):
        assert each.images.shape == (count, channels, size, size)
        assert each.images.dtype == torch.float32
        assert each.labels.dtype == torch.int64
        assert 0 <= float(each.images.min()) < 0.01
        assert 0.99 < float(each.images.max()) <= 1
        assert each.class_names == tuple("0123456789")
        assert torch.equal(each.images[:, :1].expand(-1, channels, -1, -1), each.images)


def test_the_digits_are_all_there_and_each_is_train_or_test():
    train, test = digits(8)
    theirs = load_digits()
    everything = torch.tensor(theirs.images, dtype=torch.float32)[:, None] / 16
    assert rows(train, test) == rows(ImageSet(everything, LABELS[:1].expand(1797), ("any",)))
    for image, label in zip(test.images[:20], test.labels[:20], strict=True):
        same = (everything == image).flatten(1).all(1).nonzero()[:, 0].tolist()
        assert int(label) in theirs.target[same]


def test_the_split_is_the_same_each_time():
    first = digits(8)
    digits.cache_clear()
    second = digits(8)
    assert first is not second
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_the_split_is_stratified(fraction):
    train, test = digits(8, test_fraction=fraction)
    everything = train.label_counts() + test.label_counts()
    assert everything.tolist() == np.bincount(load_digits().target).tolist()
    assert bool(((test.label_counts() - fraction * everything).abs() <= 1).all())


def test_an_image_set():
    images = ImageSet(torch.rand(5, 1, 2, 2), torch.tensor([2, 0, 2, 2, 0]), ("a", "b", "c", "d"))
    assert len(images) == 5
    assert images.label_counts().tolist() == [2, 0, 3, 0]
    for indices in ([4, 0], torch.tensor([4, 0]), np.array([4, 0])):
        chosen = images.select(indices)
        assert chosen.labels.tolist() == [0, 2]
        assert torch.equal(chosen.images, images.images[[4, 0]])
        assert chosen.class_names == images.class_names
    nothing = images.select([])
    assert len(nothing) == 0
    assert nothing.label_counts().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("shape", "labels"), [((5, 2, 2), 5), ((5, 1, 2, 2), 4)])
def test_images_that_do_not_fit_their_labels(shape, labels):
    with pytest.raises(SettingError, match=rf"images: got .*\(n, c, h, w\) with {labels} labels"):
        ImageSet(torch.rand(shape), torch.zeros(labels, dtype=torch.long), ("a",))


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1], [7, 0]])
def test_labels_beyond_the_classes(labels):
    with pytest.raises(
        SettingError, match=rf"labels: got \[{max(labels, key=lambda each: abs(each - 0.5))}\], allowed: 0 to 1"
    ):
        ImageSet(torch.rand(2, 1, 2, 2), torch.tensor(labels), ("a", "b"))


def test_masks_go_with_their_images():
    masks = torch.rand(4, 2, 3) > 0.5
    data = ImageSet(torch.rand(4, 1, 2, 3), torch.tensor([0, 1, 1, 0]), ("a", "b"), masks)
    assert torch.equal(data.select([3, 1]).masks, masks[[3, 1]])
    assert torch.equal(data.of_classes(["b"]).masks, masks[1:3])
    assert replace(data, masks=None).select([0]).masks is None
    with pytest.raises(SettingError, match=r"masks: got \(4, 3, 2\), allowed: \(4, 2, 3\)"):
        replace(data, masks=masks.transpose(1, 2))


def test_shapes_are_in_colour():
    with pytest.raises(SettingError, match="channels: got 1, allowed: 3, for source shapes"):
        DataConfig(source="shapes")
    assert DataConfig(source="shapes", channels=3).name == ""


SCHEMES = {
    "iid": DataConfig(scheme="iid"),
    "dirichlet": DataConfig(scheme="dirichlet", alpha=0.5),
    "pathological": DataConfig(scheme="pathological", classes_per_partition=2),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(list(SCHEMES)),
    st.lists(st.integers(0, 4), min_size=30, max_size=60).map(lambda some: [*range(5), *some]),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_partitions_are_disjoint_and_cover(scheme, labels, partitions, seed):
    parts = partition(torch.tensor(labels), SCHEMES[scheme], partitions, seed)
    assert len(parts) == partitions
    assert all(part.dtype == np.int64 for part in parts)
    together = np.concatenate(parts).tolist()
    assert len(set(together)) == len(together)
    assert set(together) <= set(range(len(labels)))
    if scheme != "pathological":
        assert sorted(together) == list(range(len(labels)))


@every_scheme
def test_partitions_are_a_function_of_the_seed(scheme):
    first, again, other = (partition(LABELS, SCHEMES[scheme], 4, seed) for seed in (0, 0, 1))
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def test_one_client_has_all_in_the_order_in_which_several_share_them():
    alone, shared = (partition(LABELS, SCHEMES["iid"], number, 3) for number in (1, 4))
    assert np.concatenate(alone).tolist() == np.concatenate(shared).tolist()


def test_each_seed_draws_proportions_of_its_own():
    """Not only which images of a class go where, but how many."""
    counts = [
        [LABELS[part].bincount(minlength=10).tolist() for part in partition(LABELS, SCHEMES["dirichlet"], 4, seed)]
        for seed in (0, 1)
    ]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_pathological_partitions_have_few_classes(classes):
    config = replace(SCHEMES["pathological"], classes_per_partition=classes)
    for part in partition(LABELS, config, 5, 0):
        assert len(LABELS[part].unique()) == classes


def test_iid_partitions_are_alike_and_dirichlets_are_not():
    def spread(scheme, **changes):
        parts = partition(LABELS, replace(SCHEMES[scheme], **changes), 5, 0)
        return float(torch.stack([torch.bincount(LABELS[part], minlength=10) for part in parts]).float().std(0).mean())

    assert [len(part) for part in partition(LABELS, SCHEMES["iid"], 5, 0)] == [60] * 5
    assert spread("iid") < spread("dirichlet", alpha=1.0) < spread("dirichlet", alpha=0.05)


@pytest.mark.parametrize("partitions", [0, -1, 2.0, True])
def test_a_number_of_partitions_that_cannot_be(partitions):
    with pytest.raises(SettingError, match=f"num-partitions: got {partitions}, allowed: an int >= 1"):
        partition(LABELS, DataConfig(), partitions, 0)


@every_scheme
def test_more_clients_than_images(scheme):
    with pytest.raises(SettingError, match="num-partitions: got 21, allowed: at most 20, a training image for each"):
        partition(LABELS[:20], SCHEMES[scheme], 21, 0)
    few = replace(SCHEMES[scheme], classes_per_partition=1)
    parts = partition(LABELS[:20], few, 20, 0)
    assert len(parts) == 20
    assert len(set(np.concatenate(parts).tolist())) == sum(map(len, parts)) == 20
    assert scheme == "dirichlet" or [len(part) for part in parts] == [1] * 20


def test_a_class_of_fewer_images_than_clients_that_share_it():
    reason = "data.classes_per_partition: got 2, allowed: fewer, or fewer than 20 clients: some class has fewer images"
    with pytest.raises(SettingError, match=reason):
        partition(LABELS[:20], SCHEMES["pathological"], 20, 0)


def test_more_classes_per_partition_than_there_are():
    with pytest.raises(SettingError, match="data.classes_per_partition: got 11, allowed: at most the 10 classes"):
        partition(LABELS, DataConfig(scheme="pathological", classes_per_partition=11), 2, 0)


def test_the_images_of_some_classes_in_their_order():
    data = ImageSet(torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([0, 1, 2, 2, 1, 0]), ("a", "b", "c"))
    some = data.of_classes(("c", "a"))
    assert (some.images.flatten().tolist(), some.labels.tolist()) == ([0, 2, 3, 5], [1, 0, 0, 1])
    assert some.class_names == ("c", "a")
    assert data.of_classes(None) is data
    assert data.of_classes(["a", "b", "c"]) is data
    with pytest.raises(SettingError, match=r"class_names: got \['d'\]"):
        data.of_classes(("a", "d"))
