"""Labels and logits of patch tokens, and what they change in `distill`."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from smi_fed.distillation import (
    DistillationConfig,
    blend,
    distill,
    distillation_loss,
    draw_partners,
    ensemble_probabilities,
    mix,
)
from smi_fed.models import build_model
from smi_fed.relabelling import Relabelling, of_targets, relabelled
from smi_fed.sparse_images import SparseImages
from smi_fed.training import Optimiser, draw_shift, shift_images
from tests.models import TOKEN_MODELS, small_spec, small_vit, token_model
from tests.reference.plain_labels import token_labels

QUICK = DistillationConfig(steps=4, batch_size=8)
EVEN = torch.tensor([[0.5], [0.5]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sparse(count=12, patch=4, seed=0, classes=5, size=16):
    """Random images, masks (of different numbers of patches) and targets."""
    generator, side = seeded(seed), size // patch
    mask = torch.rand(count, side, side, generator=generator) < 0.5
    return SparseImages(
        images=torch.rand(count, 3, size, size, generator=generator),
        mask=mask,
        targets=torch.randint(classes, (count,), generator=generator),
        patch_size=(patch, patch),
        ids=torch.arange(count),
        teachers=torch.zeros(count, dtype=torch.long),
        stopped_at=torch.where(mask, -1, 3),
    )


def fresh(seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_model(small_spec(**kwargs))


def relabelling_of(student, found, patch=4):
    return Relabelling(student, found, (patch, patch), (16, 16), torch.device("cpu"))


@pytest.mark.parametrize(
    ("patch", "alpha", "jitter"), [(2, 0.0, 0), (4, 1.0, 0), (8, 0.4, 0), (2, 0.4, 2), (4, 0.0, 1), (8, 1.0, 3)]
)
def test_labels_are_those_of_a_loop_over_pixels(patch, alpha, jitter):
    found = [sparse(5), sparse(4, patch=8, seed=1), sparse(3, patch=2, seed=2)]
    rows = torch.tensor([0, 11, 3, 3, 6, 8])
    shift = draw_shift(len(rows), jitter, seeded(3))
    partners = draw_partners(len(rows), alpha, seeded(5))
    correct = torch.randn(6, 5, generator=seeded(7)).softmax(1)
    relabelling = relabelling_of(fresh(patch_size=patch, depth=1), found, patch)
    labels = relabelled(blend(relabelling.target_labels(rows, shift), partners), correct)
    assert labels.shape == (6, (16 // patch) ** 2, 5)
    expected = token_labels(found, patch, 5, rows, correct, shift, partners)
    torch.testing.assert_close(labels, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(labels.sum(-1), torch.ones(labels.shape[:2]))


def test_labels_by_hand():
    kept = torch.tensor([[1.0, 0.0, 0.25], [0.0, 0.0, 1.0]])
    correct = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    labels = of_targets(torch.tensor([1, 0]), kept, 2)
    pure = relabelled(labels, correct)
    torch.testing.assert_close(pure[0], torch.tensor([[0, 1], [0.5, 0.5], [0.375, 0.625]]))
    torch.testing.assert_close(pure[1], torch.tensor([[0.2, 0.8], [0.2, 0.8], [1, 0]]))
    mixed = relabelled(blend(labels, (torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))), correct)
    # The third: 3/4 of (1/4 kept as class 1), 1/4 of (all kept as class 0), and 9/16 of the ensemble.
    torch.testing.assert_close(mixed[0, 2], torch.tensor([0.25 + 0.28125, 0.1875 + 0.28125]))
    torch.testing.assert_close(mixed[1], pure[1])


@pytest.mark.parametrize("kind", TOKEN_MODELS)
def test_image_logits_are_the_untouched_students(kind):
    student, found = token_model(kind), sparse(3)
    logits, of_tokens = relabelling_of(student, [found]).logits(found.images)
    assert torch.equal(logits, student(found.images))
    assert of_tokens.shape == (3, 16, 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize("kind", TOKEN_MODELS)
def test_token_logits_are_the_heads_of_each_token(kind):
    student, found = token_model(kind), sparse(2)
    vit = student.backbone
    _, of_tokens = relabelling_of(student, [found]).logits(found.images)
    features = vit.forward_features((found.images - student.mean) / student.std)
    for image in range(2):
        for token in range(16):
            alone = features[image, vit.num_prefix_tokens + token]
            pooled = vit.fc_norm(alone) if vit.attn_pool is None else vit.attn_pool(alone[None, None])[0]
            expected = vit.head(pooled)
            if kind == "distilled":
                expected = (expected + vit.head_dist(pooled)) / 2
            torch.testing.assert_close(of_tokens[image, token], expected, atol=1e-5, rtol=1e-4)


class BrokenNorm(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_no_hook_is_left_after_an_interrupt():
    student, found = fresh(depth=1), sparse(2)
    relabelling = relabelling_of(student, [found])
    student.backbone.fc_norm = BrokenNorm()
    with pytest.raises(KeyboardInterrupt):
        relabelling.logits(found.images)
    assert not student.backbone.norm._forward_hooks


def test_a_label_moves_its_own_token():
    student, found = small_vit(), sparse(2)
    relabelling = relabelling_of(student, [found])
    seen = []
    student.backbone.norm.register_forward_hook(lambda _m, _a, output: (output.retain_grad(), seen.append(output))[1])
    _, of_tokens = relabelling.logits(found.images)
    distillation_loss(of_tokens[:, 5], torch.eye(5)[:2], 2.0).backward()
    grad = seen[0].grad.abs().sum(-1)
    assert bool((grad[:, 1 + 5] > 0).all())
    assert float(grad.sum() - grad[:, 1 + 5].sum()) == 0
    assert float(student.backbone.patch_embed.proj.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("mixup", "jitter"), [(0.0, 0), (1.0, 0), (0.0, 2), (0.4, 3)])
def test_the_loss_of_distill_is_the_sum_of_both(mixup, jitter):
    student, teachers = fresh(patch_size=8), [small_vit(1), small_vit(2, patch_size=2, depth=1)]
    found = [sparse(6), sparse(5, patch=2, seed=1)]
    config = DistillationConfig(steps=1, batch_size=7, jitter=jitter, mixup=mixup, relabel=0.3)
    generator = seeded(4)
    rows = torch.randint(11, (7,), generator=generator)
    shift = draw_shift(7, jitter, generator)
    partners = draw_partners(7, mixup, generator)
    with torch.no_grad():
        batch = torch.cat([each.images for each in found])[rows]
        if shift is not None:
            batch = torch.stack([image.roll(by, (1, 2)) for image, by in zip(batch, shift.tolist(), strict=True)])
        batch = blend(batch, partners)
        correct = ensemble_probabilities([t(batch) for t in teachers], EVEN, 2.0)
        _, of_tokens = relabelling_of(student, found, 8).logits(batch)
        labels = token_labels(found, 8, 5, rows, correct, shift, partners)
        each = [
            4 * (labels[i, k] * (labels[i, k].log() - (of_tokens[i, k] / 2).log_softmax(0))).nansum()
            for i in range(7) for k in range(4)
        ]  # fmt: skip
        expected = distillation_loss(student(batch), correct, 2.0) + 0.3 * sum(each) / len(each)
    record = distill(student, teachers, found, config, generator=seeded(4))
    assert record.losses[0] == pytest.approx(float(expected), rel=1e-4)


def plain_mix(images, alpha, generator):
    b = len(images)
    if alpha == 1:
        share = torch.rand(b, generator=generator)
    else:
        gammas = torch._standard_gamma(torch.full((2, b), float(alpha)), generator=generator)
        share = gammas[0] / gammas.sum(0)
    share = torch.maximum(share, 1 - share).view(-1, 1, 1, 1)
    return share * images + (1 - share) * images[torch.randperm(b, generator=generator)]


@pytest.mark.parametrize("alpha", [1.0, 1, 0.4])
def test_mixing_draws_what_it_drew(alpha):
    images = torch.rand(6, 3, 4, 4, generator=seeded(1))
    first, second = seeded(2), seeded(2)
    assert torch.equal(mix(images, alpha, first), plain_mix(images, alpha, second))
    assert torch.equal(first.get_state(), second.get_state())


@pytest.mark.parametrize("mixup", [1.0, 0.4])
def test_off_is_a_plain_loop_bit_for_bit(mixup):
    teachers, found = [small_vit(1), small_vit(2)], sparse()
    config, generator = replace(QUICK, mixup=mixup), seeded()
    plain = fresh()
    optimiser = Optimiser(plain, config)
    plain.train()
    for _ in range(config.steps):
        rows = torch.randint(len(found), (config.batch_size,), generator=generator)
        batch = plain_mix(shift_images(found.images[rows], config.jitter, generator), mixup, generator)
        with torch.no_grad():
            correct = ensemble_probabilities([t(batch) for t in teachers], EVEN, config.temperature)
        optimiser.step(distillation_loss(plain(batch), correct, config.temperature))
    students, states = [], []
    for weight in (0.0, 1e-3):
        own, student = seeded(), fresh()
        distill(student, teachers, found, replace(config, relabel=weight), generator=own)
        students.append(student.state_dict())
        states.append(own.get_state())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), students[0].values(), strict=True))
    assert not torch.equal(plain.backbone.head.weight, students[1]["backbone.head.weight"])
    assert torch.equal(states[0], generator.get_state())
    assert torch.equal(states[1], states[0])


def test_a_plain_timm_vit_can_be_relabelled():
    record = distill(small_vit().backbone, [small_vit(1)], sparse(), replace(QUICK, relabel=0.5), generator=seeded())
    assert all(torch.isfinite(torch.tensor(record.losses)))


def test_tokens_learn_their_targets():
    student, teachers, found = fresh(), [small_vit(1), small_vit(2)], sparse(8)
    found = replace(found, mask=torch.ones_like(found.mask), stopped_at=torch.full_like(found.stopped_at, -1))
    config = DistillationConfig(steps=60, batch_size=16, jitter=0, mixup=0.0, relabel=1.0)
    distill(student, teachers, found, config, generator=seeded())
    with torch.no_grad():
        _, of_tokens = relabelling_of(student, [found]).logits(found.images)
    assert float((of_tokens.argmax(-1) == found.targets[:, None]).float().mean()) > 0.9
