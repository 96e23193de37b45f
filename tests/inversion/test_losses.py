import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from smi_fed.inversion import losses
from smi_fed.inversion.losses import FeatureStatistics, feature_statistics
from smi_fed.inversion.teacher import View, adapt
from smi_fed.tokens import take, to_patches
from tests.models import masked_model
from tests.reference.plain_inversion import total_variation as slow_total_variation


@st.composite
def kept_patches(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.sets(st.integers(0, rows * columns - 1), min_size=1))
    return rows, columns, sorted(kept)


@settings(deadline=None)
@given(kept_patches(), st.integers(0, 1000))
def test_total_variation_is_the_sum_over_pairs(where, seed):
    rows, columns, kept = where
    image = torch.randn(3, rows * 2, columns * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    index = torch.tensor([kept])
    patches = take(to_patches(image[None], (2, 2)), index)
    ours = losses.total_variation(patches, losses.neighbours(index, (rows, columns)))
    assert float(ours) == pytest.approx(float(slow_total_variation(image, kept, 2, columns)), abs=1e-12)


def test_total_variation_of_each_image_is_its_own():
    kept = torch.tensor([[0, 1, 4], [2, 3, 5]])
    patches = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    both = losses.total_variation(patches, losses.neighbours(kept, (2, 3)))
    for i in range(2):
        alone = losses.total_variation(patches[i : i + 1], losses.neighbours(kept[i : i + 1], (2, 3)))
        assert float(alone) == pytest.approx(float(both[i]), rel=1e-12)


def test_a_flat_image_has_a_finite_gradient():
    patches = torch.zeros(1, 4, 1, 2, 2, requires_grad=True)
    losses.total_variation(patches, losses.neighbours(torch.arange(4)[None], (2, 2))).sum().backward()
    assert bool(patches.grad.isfinite().all())


def test_gradients_of_every_loss():
    patches = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    touching = losses.neighbours(torch.tensor([[0, 1, 3], [0, 2, 3]]), (2, 2))
    assert gradcheck(lambda p: losses.total_variation(p, touching), patches)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: losses.classification(x, torch.tensor([0, 3, 1])), logits)
    labels = torch.rand(3, 4)
    assert gradcheck(lambda x: losses.classification(x, labels), logits)


@pytest.mark.parametrize("dense", [True, False])
def test_gradient_of_the_statistics_prior(vit, dense):
    teacher = adapt(vit.double())
    positions = torch.arange(16)[None].repeat(3, 1) if dense else torch.tensor([[0, 3, 9], [0, 5, 9], [1, 3, 9]])
    shape = (3, 1 + positions.shape[1], 4)
    known = FeatureStatistics((torch.randn(17, 4).double(),), (torch.rand(17, 4).double() + 0.5,), 9)
    block = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: losses.statistics_prior([x], positions, teacher, known), block)


def test_statistics_are_mean_and_deviation_over_all_batches(vit):
    model = vit.double()
    images = torch.rand(10, 3, 16, 16, dtype=torch.float64)
    known = feature_statistics(model, images.split(4))
    teacher = adapt(model)
    patches = to_patches((images - teacher.mean) / teacher.std, (4, 4))
    _, layers = teacher.features(View(patches, torch.arange(16).expand(10, -1)))
    assert torch.equal(layers[1], model.backbone.blocks[0](layers[0]))
    assert known.examples == 10
    for layer, mean, std in zip(layers, known.mean, known.std, strict=True):
        torch.testing.assert_close(mean, layer.mean(0).float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(std, layer.std(0, correction=0).float(), atol=1e-5, rtol=1e-4)


def test_the_prior_of_the_data_itself_is_zero(vit):
    model = vit.double()
    images = torch.rand(12, 3, 16, 16, dtype=torch.float64)
    known = feature_statistics(model, [images]).to(model.mean)
    teacher = adapt(model)
    positions = torch.arange(16).expand(12, -1)
    _, blocks = teacher.features(View(to_patches((images - teacher.mean) / teacher.std, (4, 4)), positions))
    assert float(losses.statistics_prior(blocks, positions, teacher, known)) < 1e-9
    assert float(losses.statistics_prior([b + 1 for b in blocks], positions, teacher, known)) > 0.01


def test_statistics_need_images_and_tokens(vit):
    with pytest.raises(ValueError, match="at least one image"):
        feature_statistics(vit, [])
    with pytest.raises(ValueError, match="no patch tokens"):
        feature_statistics(masked_model("resnet"), [torch.rand(2, 3, 32, 32)])
