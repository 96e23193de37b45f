import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smi_fed.distillation import (
    DistillationConfig,
    coverage,
    distill,
    distillation_loss,
    ensemble_probabilities,
    ensemble_weights,
    shown_tokens,
)
from smi_fed.models import build_model
from smi_fed.sparse_images import SparseImages
from smi_fed.training import TrainingConfig
from tests.models import masked_model, small_spec, small_vit

QUICK = DistillationConfig(steps=4, batch_size=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sparse(count=12, patch=4, kept=6, size=16, seed=0):
    """Random images with `kept` patches of `patch` pixels each."""
    generator, side = seeded(seed), size // patch
    order = torch.rand(count, side * side, generator=generator).argsort(1)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :kept], True).view(count, side, side)
    return SparseImages(
        images=torch.rand(count, 3, size, size, generator=generator),
        mask=mask,
        targets=torch.zeros(count, dtype=torch.long),
        patch_size=(patch, patch),
        ids=torch.arange(count),
        teachers=torch.zeros(count, dtype=torch.long),
        stopped_at=torch.where(mask, -1, 3),
    )


def covered(rows, columns, patch, mask):
    return SparseImages(
        images=torch.zeros(1, 1, rows * patch[0], columns * patch[1]),
        mask=torch.tensor(mask, dtype=torch.bool).view(1, rows, columns),
        targets=torch.zeros(1, dtype=torch.long),
        patch_size=patch,
        ids=torch.zeros(1, dtype=torch.long),
        teachers=torch.zeros(1, dtype=torch.long),
        stopped_at=torch.where(torch.tensor(mask, dtype=torch.bool).view(1, rows, columns), -1, 0),
    )


def fresh(seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_model(small_spec(**kwargs))


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def teachers_of(count=2, **kwargs):
    return [small_vit(seed, **kwargs) for seed in range(1, count + 1)]


@torch.no_grad()
def divergence(student, teachers, images, weights):
    expected = ensemble_probabilities([t(images) for t in teachers], weights, 2.0)
    return float(distillation_loss(student(images), expected, 2.0))


@pytest.mark.parametrize("kind", ["uniform", "class"])
def test_a_student_approaches_the_ensemble(kind):
    student, teachers, found = fresh(), teachers_of(), sparse(16)
    weights = ensemble_weights(kind, [1, 1], [[1, 0, 3, 0, 1], [0, 2, 1, 1, 1]])
    before = divergence(student.eval(), teachers, found.images, weights)
    config = DistillationConfig(steps=80, batch_size=16, jitter=0, mixup=0.0)
    record = distill(student, teachers, found, config, generator=seeded(), weights=weights)
    assert divergence(student, teachers, found.images, weights) < 0.2 * before
    assert record.steps == len(record.losses) == 80
    assert record.losses[0] == pytest.approx(before, rel=0.5)
    assert record.losses[-1] < 0.5 * record.losses[0]
    assert record.seconds > 0
    assert not student.training


def test_without_weights_teachers_are_even():
    runs = []
    for weights in (None, torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0], [0.0]])):
        student = fresh()
        distill(student, teachers_of(), sparse(), QUICK, generator=seeded(), weights=weights)
        runs.append(student.state_dict())
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_same_generator_same_student():
    runs = []
    for generator in (seeded(3), seeded(3), seeded(4), None, None):
        student = fresh()
        distill(student, teachers_of(), sparse(), QUICK, generator=generator)
        runs.append(student.state_dict())
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])
    assert same_weights(runs[3], runs[4])


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("fails", [None, StopHereError, KeyboardInterrupt])
def test_teachers_are_as_before(fails):
    teachers = [*teachers_of(), masked_model("resnet")]
    resnet = teachers[-1]
    resnet.image_size = (16, 16)
    teachers[1].train()
    teachers[1].backbone.blocks[0].eval()  # a mixture of modes has to come back as one
    resnet.train()
    modes = [[module.training for module in teacher.modules()] for teacher in teachers]
    states = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    student = fresh()
    seen = []

    answering = []
    for teacher in teachers:
        teacher.register_forward_pre_hook(lambda own, _: answering.append([m.training for m in own.modules()]))
    hooks = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t.modules()] for t in teachers]

    def progress(step, loss):
        seen.append((step, float(loss)))
        if fails and step == 2:
            raise fails

    if fails:
        with pytest.raises(fails):
            distill(student, teachers, sparse(), QUICK, generator=seeded(), progress=progress)
    else:
        distill(student, teachers, sparse(), QUICK, generator=seeded(), progress=progress)
    assert [step for step, _ in seen] == ([1, 2] if fails else [1, 2, 3, 4])
    assert answering
    assert not any(any(training) for training in answering)
    assert [[module.training for module in teacher.modules()] for teacher in teachers] == modes
    for teacher, state in zip(teachers, states, strict=True):
        assert same_weights(teacher.state_dict(), state)
        assert all(weight.grad is None for weight in teacher.parameters())
    assert [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t.modules()] for t in teachers] == hooks
    assert not student.training


def test_teachers_and_images_of_other_patch_sizes():
    teachers = [small_vit(1), small_vit(2, patch_size=8), small_vit(3, patch_size=2, depth=1)]
    sets = [sparse(6), sparse(6, patch=8, kept=2, seed=1), sparse(6, patch=2, kept=30, seed=2)]
    for tokens in ("all", "kept", "mixed"):
        student = fresh()
        before = copy.deepcopy(student.state_dict())
        record = distill(student, teachers, sets, replace(QUICK, tokens=tokens), generator=seeded())
        assert all(torch.isfinite(torch.tensor(record.losses)))
        assert not same_weights(student.state_dict(), before)


class Counts(nn.Module):
    """Notes how many tokens pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[1])
        return x


@pytest.mark.parametrize(("tokens", "seen"), [("all", {17}), ("kept", {7}), ("mixed", {7, 17})])
def test_the_student_sees_the_tokens_asked_for(tokens, seen):
    student = fresh()
    student.backbone.norm_pre = Counts()
    config = DistillationConfig(steps=12, batch_size=4, tokens=tokens)
    distill(student, teachers_of(), sparse(kept=6), config, generator=seeded())
    assert set(student.backbone.norm_pre.seen) == seen


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_kept_of_the_students_own_grid_is_kept(patch):
    patches = (16 // patch) ** 2
    for kept in range(1, patches + 1, max(1, patches // 8)):
        student = fresh(patch_size=patch, depth=1)
        student.backbone.norm_pre = Counts()
        for count in (1, 3):
            found = sparse(count, patch=patch, kept=kept)
            config = DistillationConfig(steps=1, batch_size=1, tokens="kept")
            distill(student, teachers_of(1), found, config, generator=seeded())
        assert student.backbone.norm_pre.seen == [1 + kept] * 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 196))
def test_as_many_tokens_as_were_kept(count, kept):
    found = sparse(count, patch=1, kept=kept, size=14)
    assert shown_tokens([found], (1, 1)).tolist() == found.kept.tolist()


def test_images_with_more_and_fewer_kept_patches_meet_at_the_mean():
    few, many = sparse(3, kept=2), sparse(3, kept=9)
    kept = shown_tokens([few, many], (4, 4))
    assert kept.shape == (6, 6)  # 5.5, rounded up
    assert torch.equal(kept, kept.sort(dim=1).values)
    assert all(set(f.tolist()) <= set(k.tolist()) for f, k in zip(few.kept, kept[:3], strict=True))
    assert all(set(k.tolist()) <= set(m.tolist()) for m, k in zip(many.kept, kept[3:], strict=True))


def test_the_best_covered_patches_of_another_grid_are_shown():
    mask = [1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]  # a share of 1, 1/4, 1/4, 0 of the larger patches
    assert shown_tokens([covered(4, 4, (4, 4), mask)], (8, 8))[0, 0].tolist() == 0
    assert shown_tokens([covered(4, 4, (4, 4), mask)], (8, 8)).shape == (1, 2)  # 6 of 16 patches are 1.5 of 4


@pytest.mark.parametrize("tokens", ["kept", "mixed"])
@pytest.mark.parametrize("kind", ["resnet", "swin", "plain timm"])
def test_a_student_without_tokens_is_shown_everything(kind, tokens):
    student = small_vit().backbone if kind == "plain timm" else masked_model(kind)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=f"tokens: got '{tokens}' for a student without patch tokens, allowed: all"):
        distill(student, teachers_of(), sparse(), replace(QUICK, tokens=tokens))
    assert same_weights(student.state_dict(), before)


def test_a_resnet_learns_from_vits():
    record = distill(masked_model("resnet"), teachers_of(), sparse(), QUICK, generator=seeded())
    assert record.steps == 4


@pytest.mark.parametrize(
    ("teachers", "sets", "says"),
    [(0, [sparse(3)], "0 teachers and 3 images"), (2, [], "2 teachers and 0 images"),
     (2, [sparse().select(slice(0, 0))], "2 teachers and 0 images"), (0, [], "0 teachers and 0 images")],
)  # fmt: skip
def test_nothing_to_learn_from(teachers, sets, says):
    with pytest.raises(ValueError, match=f"distill: got {says}, need both"):
        distill(fresh(), teachers_of(teachers), sets, QUICK)


@pytest.mark.parametrize(
    ("found", "patch", "expected"),
    [
        (covered(2, 2, (4, 4), [1, 0, 0, 1]), (4, 4), [1, 0, 0, 1]),
        (covered(2, 2, (4, 4), [1, 0, 0, 1]), (8, 8), [0.5]),
        (covered(2, 2, (4, 4), [1, 1, 0, 1]), (8, 4), [0.5, 1]),
        (covered(1, 2, (2, 4), [1, 0]), (1, 2), [1, 1, 0, 0, 1, 1, 0, 0]),
        (covered(1, 3, (6, 4), [1, 0, 1]), (6, 6), [2 / 3, 2 / 3]),
        (covered(2, 3, (3, 2), [1, 0, 1, 0, 0, 1]), (2, 6), [2 / 3, 0.5, 1 / 3]),
    ],
)
def test_coverage_by_hand(found, patch, expected):
    torch.testing.assert_close(coverage(found, patch), torch.tensor([expected], dtype=torch.float32))


def test_coverage_of_many_is_of_each():
    found = sparse(5)
    together = coverage(found, (8, 8))
    assert together.shape == (5, 4)
    for row in range(5):
        torch.testing.assert_close(coverage(found.select(torch.tensor([row])), (8, 8))[0], together[row])


def test_a_distillation_is_configured_like_a_training():
    assert isinstance(QUICK, TrainingConfig)
