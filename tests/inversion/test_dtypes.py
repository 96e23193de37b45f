"""Teachers of any floating dtype: their images are those of the float32 model, as nearly as rounding lets them."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from smi_fed.inversion import Converged, InversionConfig, PyramidConfig, feature_statistics, invert
from smi_fed.inversion.loop import DivergedError, start, step
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import View, adapt, frozen
from smi_fed.sparse_images import SparseImages
from tests.models import masked_model, small_vit, token_model
from tests.same import assert_same

HALVES = [torch.float16, torch.bfloat16]
TARGETS = torch.tensor([0, 1, 2, 3, 4])
SPARSE = InversionConfig.paper(iterations=8, schedule="2:0.3,5:0.3", jitter=2, learning_rate=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(kind):
    if kind == "plain":
        return small_vit()
    return masked_model(kind) if kind in ("swin", "resnet") else token_model(kind)


def images_of(count=6):
    return torch.rand(count, 3, 16, 16, generator=seeded(7))


CASES = {
    "plain": {},
    "registers": {},
    "attention pooled": {},
    "rotary": {},
    "swin": {},
    "resnet": {"batchnorm": 0.1},
}
CHANGES = {
    "rebirth": {"stopping": "rebirth"},
    "pyramid": {"parametrisation": PyramidConfig((2, 4)), "background": "rendered"},
    "early stop": {"leaving": Converged(2)},
    "adaptive": {"planning": "adaptive"},
    "unsettled": {"selection": "unsettled"},
    "statistics": {"statistics": 1.0, "flip": False},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*zip([*CASES, *CHANGES], itertools.cycle(HALVES)), ("plain", torch.bfloat16), ("resnet", torch.float16)],
)
def test_images_are_those_of_the_float32_model(kind, dtype):
    model = model_of(kind if kind in CASES else "plain")
    half = copy.deepcopy(model).to(dtype)
    config = replace(SPARSE, **CASES.get(kind, {}), **CHANGES.get(kind, {}))
    found = []
    for each in (model, half):
        known = feature_statistics(each, [images_of()]) if config.statistics else None
        found.append(invert(each, TARGETS, config, generator=seeded(), statistics=known))
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    exact, rounded = found
    assert rounded.images.dtype == torch.float32
    assert rounded.images.shape == exact.images.shape
    # A patch that another one replaces at a stop differs wholly, so images are compared where both went on.
    assert float((exact.mask == rounded.mask).float().mean()) > 0.85
    assert float((exact.images - rounded.images).abs().median()) < 0.01
    assert not torch.equal(exact.images, rounded.images)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_the_images_are_what_was_asked_for(dtype):
    model = small_vit()
    config = replace(SPARSE, iterations=60, schedule="10:0.3,20:0.3", jitter=0)
    found = invert(copy.deepcopy(model).to(dtype), TARGETS, config, generator=seeded())
    assert torch.equal(model(found.images).argmax(1), TARGETS)


@pytest.mark.parametrize("kind", ["pixels", "pyramid"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_pixels_and_moments_are_float32_at_least(dtype, kind):
    model = small_vit().to(dtype)
    config = replace(SPARSE, parametrisation=kind)
    problem = pose(model, config, 3)
    with frozen(model):
        state = start(problem, torch.arange(5), TARGETS)
        step(problem, state, neighbours(state.kept, problem.teacher.grid))
    wide = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in state.tensors().values() if tensor.is_floating_point()} == {wide}


@pytest.mark.parametrize("kind", ["plain", "attention pooled", "rotary", "swin"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_and_importance_are_float32(kind, dtype):
    model = model_of(kind)
    exact, rounded = adapt(model), adapt(copy.deepcopy(model).to(dtype))
    n = exact.grid[0] * exact.grid[1]
    patches = torch.randn(2, n, 3, *exact.patch_size, generator=seeded())
    view = View(patches, torch.arange(n).expand(2, -1), patches)
    expected = torch.tensor([1, 2])
    for mine, theirs in (
        (rounded.logits(view), exact.logits(view)),
        (rounded.importance(view, expected), exact.importance(view, expected)),
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=0.05 * float(theirs.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_precision_is_the_teachers_own(dtype):
    """Autocast would round what is already rounded."""
    model = small_vit().to(dtype)
    first, second = (
        invert(model, TARGETS, replace(SPARSE, precision=precision), generator=seeded())
        for precision in ("float32", "bfloat16")
    )
    assert_same(first, second)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_are_float32(dtype):
    model = small_vit()
    exact, rounded = (feature_statistics(each, images_of(12).split(5)) for each in (model, small_vit().to(dtype)))
    for mine, theirs in zip((*rounded.mean, *rounded.std), (*exact.mean, *exact.std), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("kind", ["pixels", "statistics"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_stopped_inversion_goes_on(tmp_path, dtype, kind):
    model = small_vit().to(dtype)
    config = replace(SPARSE, batch_size=2, **(CHANGES["statistics"] if kind == "statistics" else {}))
    known = feature_statistics(model, [images_of()])
    whole = invert(model, TARGETS, config, generator=seeded(), statistics=known)

    def stop(now):
        if now.done == 12:
            raise KeyboardInterrupt

    arguments = {"generator": seeded(), "statistics": known, "checkpoint": tmp_path, "checkpoint_interval": 0}
    with pytest.raises(KeyboardInterrupt):
        invert(model, TARGETS, config, progress=stop, **arguments)
    seen = []
    assert_same(invert(model, TARGETS, config, progress=seen.append, **{**arguments, "generator": seeded()}), whole)
    assert seen[0].done >= 9


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_teacher_that_overflows_is_refused(dtype):
    model = small_vit().to(dtype)
    with torch.no_grad():
        model.backbone.head.weight.sign_().mul_(torch.finfo(dtype).max)
    with pytest.raises(DivergedError, match="gradients overflow"):
        invert(model, TARGETS, SPARSE, generator=seeded())


def first_moments(model, images, config):
    """Adam's first moments after one step from `images`."""
    teacher = adapt(model)
    count, (rows, columns) = len(images), teacher.grid
    warm = SparseImages(
        images=images, mask=torch.ones(count, rows, columns, dtype=torch.bool), targets=TARGETS[:count],
        patch_size=teacher.patch_size, ids=torch.arange(count), teachers=torch.zeros(count, dtype=torch.long),
        stopped_at=torch.full((count, rows, columns), -1),
    )  # fmt: skip
    problem = pose(model, config, 3, warm=warm)
    with frozen(model):
        state = start(problem, torch.arange(count), TARGETS[:count])
        step(problem, state, neighbours(state.kept, teacher.grid))
    return state.first["pixels"].flatten(1)


def test_float16_knows_the_gradients_of_images_that_it_is_sure_of():
    model = small_vit()
    with torch.no_grad():
        model.backbone.head.weight.mul_(8)
    config = InversionConfig.dense(iterations=300, jitter=0, flip=False, tv=0.0, learning_rate=0.02)
    images = invert(model, TARGETS, config, generator=seeded()).images
    losses = F.cross_entropy(model(images), TARGETS, reduction="none")
    assert 1e-6 < float(losses.detach().max()) < 1e-3
    exact, rounded = (first_moments(each, images, config) for each in (model, copy.deepcopy(model).half()))
    assert float(F.cosine_similarity(exact, rounded).min()) > 0.98
    torch.testing.assert_close(rounded.norm(dim=1), exact.norm(dim=1), rtol=0.2, atol=0)
