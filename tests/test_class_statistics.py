"""A head out of sums: against scikit-learn on the same features, and whatever the split over clients."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from smi_fed.checks import SettingError
from smi_fed.class_statistics import ClassStatistics, class_statistics, discriminant, features, merged, put_head, ridge
from tests.models import masked_model, small_vit, token_model


@pytest.fixture(scope="module")
def model():
    return small_vit().double()


@pytest.fixture(scope="module")
def data():
    """Images whose brightness tells the class, badly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 5
    noise = torch.rand(60, 3, 16, 16, generator=generator, dtype=torch.float64)
    return 0.7 * noise + 0.06 * labels[:, None, None, None], labels


@pytest.fixture(scope="module")
def known(model, data):
    images, labels = data
    return class_statistics(model, zip(images.split(7), labels.split(7), strict=True))


def test_features_are_what_enters_the_head(model, data):
    images, _ = data
    found = model.backbone.head(features(model, images))
    torch.testing.assert_close(found, model(images))


def test_sums_do_not_depend_on_who_has_which_image(model, data, known):
    """One client has two classes, another all the rest."""
    images, labels = data
    parts = [class_statistics(model, [(images[rows], labels[rows])]) for rows in (labels < 2, labels >= 2)]
    total = merged(parts)
    for name in ("counts", "sums", "moments"):
        torch.testing.assert_close(getattr(total, name), getattr(known, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
def test_the_discriminant_is_scikit_learns(model, data, known, shrinkage):
    images, labels = data
    own = features(model, images)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(own.numpy(), labels.numpy())
    weight, bias = discriminant(known, shrinkage)
    found = (own @ weight.T + bias).softmax(-1)
    torch.testing.assert_close(found, torch.from_numpy(reference.predict_proba(own.numpy())), rtol=1e-6, atol=1e-8)


def test_ridge_is_scikit_learns(model, data, known):
    images, labels = data
    own = features(model, images).numpy()
    damping = 0.01 * float(known.moments.diagonal().mean())
    one_hot = torch.eye(5, dtype=torch.float64)[labels].numpy()
    reference = Ridge(alpha=damping, fit_intercept=False).fit(own, one_hot)
    torch.testing.assert_close(ridge(known, 0.01)[0], torch.from_numpy(reference.coef_), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solve", [discriminant, ridge])
def test_a_head_names_classes_better_than_the_start_and_never_one_that_nobody_has(model, data, solve):
    images, labels = data
    seen = labels != 3
    student = small_vit().double()
    put_head(student, solve(class_statistics(student, [(images[seen], labels[seen])])))
    named = student(images).argmax(1)
    assert (
        float((named == labels)[seen].double().mean())
        > 0.5
        > float((model(images).argmax(1) == labels).double().mean())
    )
    assert solve is ridge or not bool((named == 3).any())


def test_of_one_image_of_each_class_there_is_a_head(model, data):
    images, labels = data
    weight, bias = discriminant(class_statistics(model, [(images[:5], labels[:5])]))
    assert bool(weight.isfinite().all())
    assert bool(bias.isfinite().all())


@pytest.mark.parametrize("kind", ["registers", "clip", "average pooled", "resnet"])
def test_other_models_have_features_too(kind):
    model = masked_model(kind) if kind == "resnet" else token_model(kind)
    images = torch.rand(3, 3, *model.image_size)
    found = class_statistics(model, [(images, torch.tensor([0, 1, 1]))])
    assert found.counts.tolist() == [1, 2, 0, 0, 0]
    torch.testing.assert_close(model.backbone.get_classifier()(features(model, images)), model(images))


def test_a_model_without_one_linear_head_is_refused():
    model = token_model("distilled")
    model.backbone.get_classifier = lambda: torch.nn.Identity()
    with pytest.raises(SettingError, match="model.student: got 'deit_tiny_distilled_patch16_224', allowed: a timm"):
        class_statistics(model, [])


def test_a_discriminant_in_half_precision_names_the_same_classes():
    """Means far from 0 and directions of little variance, as features of a pretrained ViT have."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1.5, 0.5, 64, dtype=torch.float64)
    labels = torch.arange(9).repeat_interleave(100)
    means = 5 + torch.randn(9, 64, generator=generator).double() * scale
    found = means[labels] + torch.randn(900, 64, generator=generator).double() * scale
    sums = torch.zeros(9, 64, dtype=torch.float64).index_add_(0, labels, found)
    weight, bias = discriminant(ClassStatistics(labels.bincount().double(), sums, found.T @ found))
    exact = (found @ weight.T + bias).argmax(1)
    half = (found.bfloat16() @ weight.bfloat16().T + bias.bfloat16()).argmax(1)
    assert float((exact == labels).double().mean()) > 0.98
    assert float((half == exact).double().mean()) > 0.98
