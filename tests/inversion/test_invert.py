"""The invariants of `invert`."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.inversion import InversionConfig, PyramidConfig, SparseImages, feature_statistics, invert, losses
from smi_fed.inversion.loop import finish, run, start
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import adapt, frozen
from tests.models import MASKED_MODELS, TOKEN_MODELS, masked_model, small_vit, token_model

SPARSE = InversionConfig.paper(iterations=8, schedule="2:0.3,5:0.4", jitter=5)
PYRAMID = replace(SPARSE, parametrisation=PyramidConfig((2, 4)), learning_rate=0.1, flip=False, jitter=0)
TARGETS = torch.tensor([0, 1, 2, 3])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def confidence(model, images):
    return float(model(images).softmax(1).gather(1, TARGETS[:, None]).mean())


def states(model, config, targets=TARGETS):
    """The batch after each iteration."""
    problem = pose(model, config, 5)
    state = start(problem, torch.arange(len(targets)), targets)
    for _ in run(problem, state):
        yield problem, state


@pytest.mark.parametrize("kind", [*TOKEN_MODELS, *MASKED_MODELS])
def test_every_kind_of_model(kind):
    model = token_model(kind) if kind in TOKEN_MODELS else masked_model(kind)
    found = invert(model, TARGETS, SPARSE, generator=seeded())
    patches = found.mask[0].numel()
    assert found.kept.shape == (4, SPARSE.schedule.kept_counts(patches)[-1][1])
    assert found.images.dtype == torch.float32
    assert bool(((found.images >= 0) & (found.images <= 1)).all())
    assert found.targets.tolist() == TARGETS.tolist()
    stopped = found.stopped_at[~found.mask]
    assert set(stopped.unique().tolist()) == {2, 5}
    assert bool((found.stopped_at[found.mask] == -1).all())


@pytest.mark.parametrize("config", [SPARSE, PYRAMID], ids=["pixels", "pyramid"])
def test_a_stopped_patch_never_changes_again(vit, config):
    snapshots = {}
    with frozen(vit):
        for _, state in states(vit, config):
            stopped = state.stopped_at >= 0
            for image, patch in stopped.nonzero().tolist():
                now = state.canvas[image, patch].clone()
                assert torch.equal(snapshots.setdefault((image, patch), now), now)
    assert len(snapshots) == 4 * (16 - 6)


@pytest.mark.parametrize("kind", ["plain", "distilled", "average pooled", "swin", "resnet"])
def test_no_gradient_reaches_a_stopped_patch(kind):
    model = token_model(kind) if kind in TOKEN_MODELS else masked_model(kind)
    teacher = adapt(model)
    patches = torch.randn(1, teacher.grid[0] * teacher.grid[1], 3, *teacher.patch_size, requires_grad=True)
    kept = torch.arange(0, patches.shape[1], 3)[None]
    from smi_fed.inversion.teacher import View
    from smi_fed.tokens import take

    logits = teacher.logits(View(take(patches, kept), kept, patches.detach()))
    logits.square().sum().backward()
    sizes = patches.grad.abs().sum((2, 3, 4))[0]
    stopped = torch.ones_like(sizes, dtype=torch.bool)
    stopped[kept[0]] = False
    assert float(sizes[stopped].max()) == 0.0
    assert float(sizes[~stopped].min()) > 0.0


@pytest.mark.parametrize("config", [SPARSE, PYRAMID], ids=["pixels", "pyramid"])
@pytest.mark.parametrize("selection", ["attention", "random"])
def test_images_do_not_depend_on_their_batch(vit, config, selection):
    model = vit.double()
    config = replace(config, iterations=10, selection=selection, tv=0.01)
    together = invert(model, TARGETS, config, generator=seeded())
    alone = invert(model, TARGETS, replace(config, batch_size=1), generator=seeded())
    pairs = invert(model, TARGETS, replace(config, batch_size=3), generator=seeded())
    assert torch.equal(together.mask, alone.mask)
    torch.testing.assert_close(together.images, alone.images, atol=1e-7, rtol=0)
    torch.testing.assert_close(together.images, pairs.images, atol=1e-7, rtol=0)


def test_same_generator_same_images(vit):
    first, second = (invert(vit, TARGETS, SPARSE, generator=seeded(3)) for _ in range(2))
    other = invert(vit, TARGETS, SPARSE, generator=seeded(4))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_a_caller_without_gradients_gets_the_same_images(vit):
    with torch.no_grad():
        without = invert(vit, TARGETS, SPARSE, generator=seeded())
        assert not torch.is_grad_enabled()
    assert torch.equal(without.images, invert(vit, TARGETS, SPARSE, generator=seeded()).images)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("how", ["to the end", "exception in a forward", "Ctrl-C"])
@pytest.mark.parametrize("kind", ["plain", "resnet"])
def test_the_teacher_is_as_before(kind, how):
    model = token_model(kind) if kind in TOKEN_MODELS else masked_model(kind)
    model.train()
    list(model.modules())[3].eval()  # a mixture of modes has to come back as one
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes, flags = [m.training for m in model.modules()], [w.requires_grad for w in weights]
    calls = 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt if how == "Ctrl-C" else StopHereError

    if how == "to the end":
        invert(model, TARGETS, SPARSE, generator=seeded())
    else:
        handle = list(model.backbone.children())[-2].register_forward_hook(interrupt)
        with pytest.raises((StopHereError, KeyboardInterrupt)):
            invert(model, TARGETS, SPARSE, generator=seeded())
        handle.remove()
    assert [m.training for m in model.modules()] == modes
    assert [w.requires_grad for w in weights] == flags
    assert all(w.grad is None for w in weights)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.tensor([]), "at least one"),
        (torch.tensor([], dtype=torch.long), "at least one"),
        (torch.tensor([0.0, 1.0]), "integers"),
        (torch.tensor([True, False]), "integers"),
        (torch.tensor([0, 5]), "0 to 4"),
        (torch.tensor([-1, 2]), "0 to 4"),
        (torch.tensor([[0, 1]]), "integers"),
        (torch.full((2, 5), 1.5), r"\[0, 1\]"),
        (torch.zeros(2, 4), "integers"),
    ],
)
def test_bad_targets_are_refused_before_any_work(vit, targets, says):
    vit.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=says):
        invert(vit, targets, SPARSE)


def test_multi_label_targets(vit):
    targets = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0.5, 1]])
    config = InversionConfig.dense(iterations=60, learning_rate=0.05, jitter=0, flip=False, tv=0)
    found = invert(vit, targets, config, generator=seeded())
    assert torch.equal(found.targets, targets)
    with torch.no_grad():
        start, end = (losses.classification(vit(x), targets) for x in (torch.rand(2, 3, 16, 16), found.images))
    assert float(end.max()) < 0.75 * float(start.min())


def test_inversion_finds_images_that_the_teacher_is_sure_of(vit):
    found = invert(vit, TARGETS, replace(SPARSE, iterations=60, jitter=0, flip=False), generator=seeded())
    assert confidence(vit, found.images) > 2 * confidence(vit, torch.rand(4, 3, 16, 16))
    assert vit(found.images).argmax(1).tolist() == TARGETS.tolist()


def test_one_loop_dense_is_an_empty_schedule(vit):
    dense = invert(vit, TARGETS, InversionConfig.dense(iterations=4), generator=seeded())
    assert dense.kept_fraction == 1.0
    late = invert(vit, TARGETS, InversionConfig.paper(iterations=4, schedule=""), generator=seeded())
    assert torch.equal(dense.images, late.images)


def test_rendered_background_goes_on_and_frozen_does_not(vit):
    frozen_, rendered = (
        invert(vit, TARGETS, replace(PYRAMID, selection="random", background=kind), generator=seeded())
        for kind in ("frozen", "rendered")
    )
    kept = frozen_.mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(frozen_.images)
    assert torch.equal(frozen_.mask, rendered.mask)
    assert torch.equal(frozen_.images[kept], rendered.images[kept])
    assert not torch.equal(frozen_.images[~kept], rendered.images[~kept])


def test_a_plain_timm_model_is_as_good_as_ours(vit):
    import timm

    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, **vit.spec.kwargs).eval()
    plain.load_state_dict(vit.backbone.state_dict())
    ours = invert(vit, TARGETS, SPARSE, generator=seeded())
    assert torch.equal(invert(plain, TARGETS, SPARSE, generator=seeded()).images, ours.images)


def test_progress_counts_every_iteration(vit):
    seen = []
    invert(vit, TARGETS, replace(SPARSE, batch_size=3), generator=seeded(), progress=seen.append)
    assert [now.done for now in seen] == list(range(1, 17))
    assert {now.total for now in seen} == {16}
    assert [now.kept for now in seen[:8]] == [16, 16, 11, 11, 11, 6, 6, 6]
    assert (seen[7].images, seen[-1].images) == (3, 4)


def test_statistics_are_asked_for_and_checked(vit):
    config = replace(PYRAMID, statistics=1.0)
    with pytest.raises(ValueError, match="no statistics"):
        invert(vit, TARGETS, config)
    known = feature_statistics(vit, [torch.rand(8, 3, 16, 16)])
    with pytest.raises(ValueError, match="jitter: got 4"):
        invert(vit, TARGETS, replace(config, jitter=4), statistics=known)
    with pytest.raises(ValueError, match="without patch tokens"):
        invert(masked_model("resnet"), TARGETS, config, statistics=known)
    with pytest.raises(ValueError, match="expected finite ones for 17 tokens"):
        invert(vit, TARGETS, config, statistics=replace(known, mean=known.mean[:1]))
    assert isinstance(invert(vit, TARGETS, config, statistics=known), SparseImages)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.lists(st.floats(0.05, 0.9), min_size=0, max_size=3), st.integers(0, 100))
def test_masks_follow_any_schedule(images, ratios, seed):
    model = small_vit()
    schedule = ",".join(f"{i + 1}:{ratio}" for i, ratio in enumerate(ratios))
    config = InversionConfig.paper(iterations=5, schedule=schedule, selection="random")
    found = invert(model, torch.zeros(images, dtype=torch.long), config, generator=seeded(seed))
    assert found.kept.shape == (images, config.schedule.kept_counts(16)[-1][1])


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_finds_sure_images_too(vit, precision):
    config = replace(SPARSE, iterations=60, jitter=0, flip=False, precision=precision)
    found = invert(vit.cuda(), TARGETS, config, generator=seeded())
    assert found.images.device.type == "cpu"
    assert confidence(vit.cpu(), found.images) > 2 * confidence(vit, torch.rand(4, 3, 16, 16))


@pytest.mark.cuda
def test_cuda_draws_the_same_random_choices(vit):
    config = replace(SPARSE, iterations=3, schedule="1:0.3", selection="random")
    on_cpu = invert(vit, TARGETS, config, generator=seeded())
    on_gpu = invert(vit.cuda(), TARGETS, config, generator=seeded())
    assert torch.equal(on_cpu.mask, on_gpu.mask)


@pytest.mark.parametrize("config", [SPARSE, PYRAMID], ids=["pixels", "pyramid"])
def test_a_warm_start_goes_on_from_images(vit, config):
    config = replace(config, iterations=20)
    first = invert(vit, TARGETS, config, generator=seeded())
    problem = pose(vit, config, 5, warm=first.select(torch.tensor([2, 0])))
    state = start(problem, torch.arange(4), TARGETS)
    shown = finish(problem, state).images
    cold = finish(replace(problem, warm=None), start(replace(problem, warm=None), torch.arange(4), TARGETS)).images
    assert torch.equal(shown[[1, 3]], cold[[1, 3]])
    warm, noise = ((each - first.images).abs().mean((1, 2, 3))[[0, 2]] for each in (shown, cold))
    # A pyramid cannot show its own frozen patches: each was rendered from other coefficients.
    assert bool((warm < (1e-6 if config.parametrisation.kind == "pixels" else 0.25 * noise)).all())


def test_a_warm_start_is_checked(vit):
    first = invert(vit, TARGETS, SPARSE, generator=seeded())
    with pytest.raises(ValueError, match="warm: got ids"):
        invert(vit, TARGETS[:2], SPARSE, warm=first)
    with pytest.raises(ValueError, match=r"warm: got images of \(3, 16, 16\), allowed: \(3, 32, 32\)"):
        invert(masked_model("resnet"), TARGETS, SPARSE, warm=first)
