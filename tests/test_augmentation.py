import pytest
import torch

from smi_fed.augmentation import augmentation
from smi_fed.training import seeded_torch

KINDS = ("standard", "randaugment")


def views(kind, images, seed=0):
    with seeded_torch(torch.Generator().manual_seed(seed)):
        return augmentation(kind)(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_views_are_images_of_the_same_shape(kind, channels):
    images = torch.rand(16, channels, 12, 20)
    for seed in range(4):
        found = views(kind, images, seed)
        assert found.shape == images.shape
        assert found.dtype == torch.float32
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_a_function_of_the_generator(kind):
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(views(kind, images, 1), views(kind, images, 1))
    assert not torch.equal(views(kind, images, 1), views(kind, images, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_draws_of_its_own(kind):
    one = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    found = views(kind, one)
    assert len({tuple(image.flatten().tolist()) for image in found}) == 8


def test_mirror_images_crops_and_colours_are_drawn():
    """A bright left half is on the right in about half of the views, of another size and another brightness."""
    left = torch.zeros(1, 3, 16, 16)
    left[..., :8] = 0.5
    found = views("standard", left.expand(200, -1, -1, -1))
    mirrored = found[..., :4].mean((1, 2, 3)) < found[..., -4:].mean((1, 2, 3))
    assert 60 < int(mirrored.sum()) < 140
    assert found.amax((1, 2, 3)).std() > 0.02
    assert found.gt(0.2).float().mean((1, 2, 3)).std() > 0.05


def test_none_is_nothing():
    images = torch.rand(2, 3, 8, 8)
    assert augmentation("none")(images) is images
