"""Presets for a student: what is trained, on which views, and when it stops."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from smi_fed.distillation import DistillationConfig, distill
from smi_fed.distillation.loop import _half_square
from smi_fed.distillation.watching import Watch, divide
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


def test_teachers_and_student_compute_in_bfloat16_and_the_loss_does_not():
    seen, teacher, student = {}, small_vit(seed=1), small_vit()
    for name, model in (("teacher", teacher), ("student", student)):

        def watch(_module, _images, output, key=name):
            seen[key] = output.dtype

        model.backbone.blocks[0].mlp.fc1.register_forward_hook(watch)
    distill(student, [teacher], targeted(12), replace(HEAD, precision="bfloat16"), generator=seeded())
    assert seen == {"teacher": torch.bfloat16, "student": torch.bfloat16}
    assert {weight.dtype for weight in (*teacher.parameters(), *student.parameters())} == {torch.float32}


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


def held_out_loss(student, teacher, images, config):
    """T^2 KL on the images that `distill` holds out, from the formula."""
    _, held = divide([images], config, None, seeded())
    with torch.no_grad():
        said, expected = (model(images.images[held]) / config.temperature for model in (student, teacher))
    return float(config.temperature**2 * F.kl_div(said.log_softmax(1), expected.softmax(1), reduction="batchmean"))


HELD_OUT = {"batch_size": 4, "epochs": 6.0, "validation": 0.25, "augmentation": "none", "mixup": 0.0}


def test_the_start_is_returned_where_no_step_agrees_better():
    """It starts as its teacher, so that whatever it learns by large steps is worse."""
    student, teacher = small_vit(seed=1), small_vit(seed=1)
    config = DistillationConfig.finetune(**HELD_OUT, learning_rate=0.3)
    record = distill(student, [teacher], targeted(48), config, generator=seeded())
    assert record.kept == "start"
    assert record.steps > 0
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())


def test_the_best_step_is_kept_where_one_agrees_better():
    student, start, teacher, images = small_vit(), small_vit(), small_vit(seed=1), targeted(48)
    config, seen = DistillationConfig.finetune(**HELD_OUT), {}

    def look(step, _loss):
        if step % 9 == 0:  # whole epochs of 36 images
            seen[step] = held_out_loss(student.eval(), teacher, images, config)

    record = distill(student, [teacher], images, config, generator=seeded(), progress=look)
    best = min(seen, key=seen.get)
    assert record.kept == f"step {best}"
    assert held_out_loss(student, teacher, images, config) == pytest.approx(seen[best], rel=1e-5)
    assert seen[best] < held_out_loss(start, teacher, images, config)


def test_a_start_that_is_not_finite_is_nobodys_best(monkeypatch):
    losses = iter([float("nan"), 2.0, 1.0, 3.0])
    monkeypatch.setattr(Watch, "_loss", lambda _: next(losses))
    config = DistillationConfig.finetune(**HELD_OUT | {"epochs": 3.0})
    record = distill(small_vit(), [small_vit(seed=1)], targeted(48), config, generator=seeded())
    assert record.kept == "step 18"


def test_without_held_out_images_the_last_step_is_kept_and_without_steps_the_start():
    student, teacher = small_vit(), small_vit(seed=1)
    assert distill(student, [teacher], targeted(12), HEAD, generator=seeded()).kept == "step 9"
    student = small_vit().train()
    record = distill(student, [teacher], targeted(12), DistillationConfig(steps=0), generator=seeded())
    assert (record.kept, record.steps, record.losses) == ("start", 0, [])
    assert not student.training
    assert all(torch.equal(value, small_vit().state_dict()[key]) for key, value in student.state_dict().items())


def test_an_anchor_holds_the_student_near_its_start():
    away = []
    for anchor in (0.0, 1.0, 100.0):
        student, start = small_vit(), small_vit()
        config = DistillationConfig.finetune(batch_size=4, steps=20, validation=0.0, augmentation="none", anchor=anchor)
        distill(student, [small_vit(seed=1)], targeted(12), config, generator=seeded())
        with torch.no_grad():
            away.append(float(_half_square(list(student.parameters()), list(start.parameters()))))
    assert away[0] > away[1] > away[2]
    assert float(_half_square([torch.tensor([3.0, 1.0])], [torch.tensor([1.0, 0.0])])) == 2.5
