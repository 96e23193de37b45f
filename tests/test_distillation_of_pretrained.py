"""Presets for a student: what is trained, on which views, and when it stops."""

import logging
from dataclasses import replace

import pytest
import torch

from smi_fed.distillation import DistillationConfig, distill
from smi_fed.distillation.watching import divide
from tests.models import small_vit
from tests.test_distillation import seeded, sparse

HEAD = DistillationConfig.head(batch_size=4, epochs=3.0, validation=0.0, augmentation="none")


def targeted(count, classes=3, seed=0):
    return replace(sparse(count, seed=seed), targets=torch.arange(count) % classes)


def test_only_the_head_of_the_student_changes():
    student, images = small_vit(), targeted(12)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    record = distill(student, [small_vit(seed=1)], images, HEAD, generator=seeded())
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"backbone.head.weight", "backbone.head.bias"}
    assert record.steps == len(record.losses) == 9
    assert all(weight.requires_grad for weight in student.parameters())
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize("augmentation", ["none", "standard", "randaugment"])
def test_teacher_and_student_see_the_same_random_views(augmentation):
    config, seen = DistillationConfig.finetune(steps=3, batch_size=4, augmentation=augmentation, validation=0.0), {}
    teacher, student = small_vit(seed=1), small_vit()
    for name, model in (("teacher", teacher), ("student", student)):
        model.register_forward_pre_hook(lambda _, images, key=name: seen.setdefault(key, []).append(images[0]))
    distill(student, [teacher], targeted(12), config, generator=seeded())
    assert len(seen["student"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["teacher"], seen["student"], strict=True))
    again = small_vit()
    distill(again, [teacher], targeted(12), config, generator=seeded())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())


def test_bfloat16_is_the_students_alone():
    seen, teacher, student = {}, small_vit(seed=1), small_vit()
    for name, model in (("teacher", teacher), ("student", student)):

        def watch(_module, _images, output, key=name):
            seen[key] = output.dtype

        model.backbone.blocks[0].mlp.fc1.register_forward_hook(watch)
    distill(student, [teacher], targeted(12), replace(HEAD, precision="bfloat16"), generator=seeded())
    assert seen == {"teacher": torch.float32, "student": torch.bfloat16}


def test_what_is_held_out_is_never_taught_and_classes_are_even():
    images = replace(sparse(60), targets=torch.tensor([0] * 40 + [1] * 20))
    config = DistillationConfig.finetune(validation=0.25)
    shares, held = divide([images], config, None, seeded())
    assert len(held) == 15
    assert bool((shares[held] == 0).all())
    assert float(shares[:40].sum()) == pytest.approx(float(shares[40:].sum()))
    assert (shares > 0).sum() == 45
    given, _ = divide([images], config, torch.full((60,), 0.5), seeded())
    torch.testing.assert_close(given, shares / 2)


def test_without_either_nothing_is_drawn():
    generator = seeded()
    shares, held = divide([sparse(9)], DistillationConfig(), None, generator)
    assert (shares, len(held)) == (None, 0)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_a_student_that_gets_no_better_stops_with_its_best_weights(caplog):
    """It starts as its teacher, so that whatever it is taught by large steps only harms."""
    student, teacher = small_vit(seed=1), small_vit(seed=1)
    config = DistillationConfig.finetune(
        batch_size=4, epochs=50.0, learning_rate=0.3, validation=0.25, patience=2, augmentation="none", mixup=0.0
    )
    with caplog.at_level(logging.INFO, "smi_fed"):
        record = distill(student, [teacher], targeted(48), config, generator=seeded())
    assert record.steps < 450
    assert record.steps % 9 == 0  # whole epochs of 36 images
    assert f"early stop after {record.steps} of 450 steps" in caplog.text
