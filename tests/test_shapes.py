from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smi_fed.checks import SettingError
from smi_fed.config import load_settings
from smi_fed.data import DataConfig, load_images, shapes
from smi_fed.models import build_model
from smi_fed.shapes import CLASS_NAMES, Objects, draw_shapes, paint

CONF = Path(__file__).resolve().parents[1] / "conf"
EVERY = torch.arange(60) % 10
SAME_OUTLINE = [("disc", "striped disc"), ("square", "checkered square"), ("triangle", "dotted triangle")]


def draw(labels=EVERY, size=32, seed=0):
    return draw_shapes(labels, size, torch.Generator().manual_seed(seed))


def of(name, count=40):
    return torch.full((count,), CLASS_NAMES.index(name))


def coarse(images, cells=8):
    return F.interpolate(images, (cells, cells), mode="area")


def objects(labels, **changes):
    n = len(labels)
    plain = Objects(
        labels, torch.rand(n, 3), torch.full((n, 3), 0.2), torch.zeros(n, 2), torch.full((n,), 0.7), torch.zeros(n)
    )
    return replace(plain, **changes)


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 48), st.lists(st.integers(0, 9), max_size=12), st.integers(0, 99))
def test_images_and_masks(size, labels, seed):
    images, masks = draw(torch.tensor(labels, dtype=torch.long), size, seed)
    assert images.shape == (len(labels), 3, size, size)
    assert masks.shape == (len(labels), size, size)
    assert (images.dtype, masks.dtype) == (torch.float32, torch.bool)
    assert bool(((images >= 0) & (images <= 1)).all())
    assert bool(masks.flatten(1).any(1).all())
    assert not bool(masks.flatten(1).all(1).any())


def test_a_seed_is_a_set_of_images():
    first, again, other = draw(), draw(), draw(seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("size", [7, 32.0, True])
def test_a_size_that_cannot_be(size):
    with pytest.raises(SettingError, match=f"size: got {size}, allowed: an int >= 8"):
        draw(size=size)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_cannot_be(label):
    with pytest.raises(SettingError, match=rf"labels: got \[{label}\], allowed: 0 to 9"):
        draw(torch.tensor([label]))


def test_outside_the_mask_is_the_background():
    backgrounds = torch.rand(60, 3, 32, 32)
    images, masks = paint(backgrounds, objects(EVERY))
    changed = (images != backgrounds).any(1)
    assert torch.equal(changed, masks)


def test_outside_the_masks_the_class_does_not_matter():
    (images, masks), (others, other_masks) = draw(), draw((EVERY + 3) % 10)
    either = masks | other_masks
    assert bool((images == others).all(1)[~either].all())
    assert bool((images != others).any(1)[either].flatten().float().mean() > 0.5)


def test_the_colour_changes_the_masks_pixels_alone():
    backgrounds = torch.rand(60, 3, 32, 32)
    dark, light = (paint(backgrounds, objects(EVERY, colours=torch.full((60, 3), each))) for each in (0.3, 0.7))
    assert torch.equal(dark[1], light[1])
    assert torch.equal((dark[0] != light[0]).any(1), dark[1])


def test_an_object_differs_from_its_background():
    images, masks = draw(of("disc", 100))
    inside, outside = ((images * each[:, None]).sum((2, 3)) / each.sum((1, 2))[:, None] for each in (masks, ~masks))
    assert float((inside - outside).norm(dim=1).min()) > 0.2


@pytest.mark.parametrize("size", [16, 64])
def test_a_scene_is_the_same_at_every_size(size):
    (images, masks), (others, other_masks) = draw(), draw(size=size)
    assert float((masks.float().mean((1, 2)) - other_masks.float().mean((1, 2))).abs().max()) < 0.15
    assert float((coarse(images) - coarse(others)).abs().mean()) < 0.03


@pytest.mark.parametrize(("plain", "textured"), SAME_OUTLINE)
def test_textures_are_detail(plain, textured):
    (images, masks), (others, other_masks) = draw(of(plain)), draw(of(textured))
    assert torch.equal(masks, other_masks)
    whole = masks & (F.avg_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0] == 1)
    fine = (images - others).abs().mean(1)[whole].mean()
    assert float((coarse(images) - coarse(others)).abs().max(1).values.mean()) < 0.25 * float(fine)


def test_low_frequencies_lose_the_detail():
    images, masks = draw()
    blurred = F.interpolate(coarse(images), (32, 32), mode="bilinear")
    assert float((images - blurred).abs().mean(1)[masks].mean()) > 0.05


def test_classes_are_different_objects():
    labels = torch.arange(10)
    images, _ = paint(torch.zeros(10, 3, 32, 32), objects(labels, colours=torch.full((10, 3), 0.7)))
    distance = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(10)
    assert float(distance.min()) > 1


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_the_split(fraction):
    train, test = load_images(DataConfig(source="shapes", channels=3, image_size=16, test_fraction=fraction))
    assert (len(train), len(test)) == (3000 - 3000 * fraction, 3000 * fraction)
    for each in (train, test):
        assert each.images.shape[1:] == (3, 16, 16)
        assert each.masks.shape == (len(each), 16, 16)
        assert each.class_names == CLASS_NAMES
        assert each.label_counts().tolist() == [len(each) // 10] * 10


def test_the_embedded_shapes_are_drawn_once():
    assert shapes(8) is shapes(8)
    first = shapes(8)
    shapes.cache_clear()
    for a, b in zip(first, shapes(8), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.masks, b.masks)


def test_the_configuration():
    found = load_settings(CONF, ["data=shapes", "model=shapes"])
    assert found.data == DataConfig(source="shapes", channels=3)
    assert len({str(spec.kwargs) for spec in [*found.model.clients.values(), found.model.student]}) == 5
    for spec in [*found.model.clients.values(), found.model.student]:
        assert spec.class_names == CLASS_NAMES
        assert build_model(spec)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(SettingError, match="data.channels: got 1"):
        load_settings(CONF, ["data=shapes", "data.channels=1"])
