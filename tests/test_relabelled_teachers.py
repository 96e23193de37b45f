"""What cannot be relabelled, and in whose classes the labels are."""

from dataclasses import replace

import pytest
import torch

from smi_fed import pipeline
from smi_fed.alignment import align_targets
from smi_fed.distillation import DistillationConfig, distill
from smi_fed.models import build_model
from smi_fed.pipeline import TrainedTeacher, distill_student
from smi_fed.pool import Entry
from tests.models import masked_model, small_spec, small_vit
from tests.test_relabelling import QUICK, fresh, relabelling_of, seeded, sparse


def multi_label(count=4):
    return replace(sparse(count), targets=torch.rand(count, 5))


@pytest.mark.parametrize(
    ("student", "found", "says"),
    [
        (lambda: masked_model("resnet"), sparse, "0.5 for a student without one token for each patch, allowed: 0"),
        (lambda: masked_model("swin"), sparse, "0.5 for a student without one token for each patch, allowed: 0"),
        (lambda: small_vit(patch_drop_rate=0.5), sparse, "0.5 for a student without one token for each patch"),
        (small_vit, multi_label, r"multi-label targets \(4, 5\), allowed: one class per image"),
        (small_vit, lambda: replace(sparse(), targets=torch.full((12,), 5)), "targets from 5 to 5, .* 0 to 4"),
        (small_vit, lambda: replace(sparse(), targets=torch.full((12,), -1)), "targets from -1 to -1, .* 0 to 4"),
    ],
)
def test_what_cannot_be_relabelled(student, found, says):
    student = student()
    before = [weight.clone() for weight in student.state_dict().values()]
    with pytest.raises(ValueError, match=f"relabel: got {says}"):
        distill(student, [small_vit(1)], found(), replace(QUICK, relabel=0.5), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, student.state_dict().values(), strict=True))
    distill(student, [small_vit(1)], found(), QUICK, generator=seeded())


def test_targets_in_the_students_classes():
    found = replace(sparse(4), targets=torch.tensor([0, 1, 2, 0]))
    assert align_targets(found, (4, 0, 3)).targets.tolist() == [4, 0, 3, 4]
    assert align_targets(found, [4, 0, 3]).targets.dtype == torch.int64
    assert align_targets(found, None) is found
    several = multi_label()
    assert align_targets(several, (1, 0)) is several


def test_each_set_is_read_in_its_own_teachers_classes(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "distill", lambda student, teachers, images, *_, **__: seen.extend(images))
    teachers = [
        TrainedTeacher("a", small_vit(1), 10, classes=(3, 1, 0, 2, 4), num_classes=5),
        TrainedTeacher("b", build_model(small_spec(num_classes=2)), 10, classes=(4, 2), num_classes=5),
        TrainedTeacher("c", small_vit(2), 10),
    ]
    images = [sparse(9, seed=i, classes=n) for i, n in enumerate([5, 2, 5])]
    reused = [Entry(1, "gone", sparse(9, seed=5, classes=2), (1, 3)), Entry(1, "c", sparse(9, seed=6))]
    config = DistillationConfig(relabel=0.5)
    distill_student(small_vit(), teachers, images, config, seeded(), reused=reused)
    places = [(3, 1, 0, 2, 4), (4, 2), range(5), (1, 3), range(5)]
    given = [*images, *(entry.images for entry in reused)]
    for found, own, place in zip(seen, given, places, strict=True):
        assert found.targets.tolist() == [place[target] for target in own.targets.tolist()]
        assert torch.equal(found.images, own.images)


def test_a_teacher_of_a_part_of_the_classes_teaches_its_targets():
    """One of two classes, the student's fourth and second: tokens under kept patches learn these, not 0 and 1."""
    torch.manual_seed(0)
    teacher = TrainedTeacher("half", build_model(small_spec(num_classes=2)), 10, (5, 5), None, (3, 1), 5)
    found = sparse(8, classes=2)
    found = replace(found, mask=torch.ones_like(found.mask), stopped_at=torch.full_like(found.stopped_at, -1))
    config = DistillationConfig(steps=150, batch_size=16, jitter=0, mixup=0.0, relabel=2.0)
    student = fresh()
    distill_student(student, [teacher], [found], config, seeded())
    with torch.no_grad():
        _, of_tokens = relabelling_of(student, [found]).logits(found.images)
    expected = torch.tensor([3, 1])[found.targets]
    assert float((of_tokens.argmax(-1) == expected[:, None]).float().mean()) > 0.9


def test_as_many_sets_as_teachers():
    with pytest.raises(ValueError, match="zip"):
        distill_student(small_vit(), [TrainedTeacher("a", small_vit(1), 1)], [sparse(), sparse()], QUICK, seeded())
