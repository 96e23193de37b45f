import numpy as np
import pytest
import torch
from PIL import Image

from smi_fed.alignment import Aligned, class_positions, resize, union_of_classes
from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec
from smi_fed.pipeline import TrainedTeacher
from tests.models import small_vit


def named(*names, count=None):
    return ModelSpec("vit_tiny_patch16_224", len(names) or count, class_names=names or None)


def photos(size=16, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_teacher_of_the_same_classes_and_size_answers_as_it_is():
    model = small_vit()
    assert torch.equal(Aligned(model, range(5), 5)(photos()), model(photos()))


@torch.no_grad()
def test_classes_in_another_order_are_put_in_the_students():
    model = small_vit()
    logits = model(photos())
    found = Aligned(model, [2, 0, 4, 1, 3], 5)(photos())
    for own, place in enumerate([2, 0, 4, 1, 3]):
        assert torch.equal(found[:, place], logits[:, own])


@torch.no_grad()
def test_classes_that_a_teacher_does_not_know_get_minus_infinity_and_no_probability():
    model = small_vit()
    found = Aligned(model, [6, 1, 0, 3, 5], 7)(photos())
    assert found.shape == (2, 7)
    assert torch.equal(found[:, [6, 1, 0, 3, 5]], model(photos()))
    assert bool((found[:, [2, 4]] == -torch.inf).all())
    assert bool((found.softmax(1)[:, [2, 4]] == 0).all())
    torch.testing.assert_close(found.softmax(1)[:, [6, 1, 0, 3, 5]], model(photos()).softmax(1))


@torch.no_grad()
def test_a_first_part_of_the_classes_is_a_part_too():
    found = Aligned(small_vit(), range(5), 6)(photos())
    assert found.shape == (2, 6)
    assert bool((found[:, 5] == -torch.inf).all())


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 16, 21, 64])
def test_a_teacher_is_shown_images_at_its_own_size(size):
    model = small_vit()
    found = Aligned(model, range(5), 5)(photos(size))
    assert torch.equal(found, model(resize(photos(size), (16, 16))))


def test_an_aligned_teacher_adds_no_weights():
    model = small_vit()
    assert {f"model.{key}" for key in model.state_dict()} == set(Aligned(model, [1, 0, 2, 3, 4], 5).state_dict())


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (40, 32), (5, 50)])
def test_resizing_is_bilinear_with_antialiasing(size):
    image = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    plain = Image.fromarray(image[0, 0].numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    torch.testing.assert_close(resize(image, size)[0, 0], torch.from_numpy(np.array(plain)), atol=1e-5, rtol=1e-5)


def test_images_of_that_size_are_left_as_they_are_and_pixels_stay_pixels():
    images = photos(16)
    assert resize(images, (16, 16)) is images
    grey = torch.full((1, 3, 16, 16), 0.25)
    torch.testing.assert_close(resize(grey, (7, 30)), torch.full((1, 3, 7, 30), 0.25))
    found = resize(photos(30), (11, 11))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_classes_are_found_by_name():
    student = named("ant", "bee", "cat", "dog")
    assert class_positions(named("dog", "ant"), student) == (3, 0)
    assert class_positions(named("ant", "bee", "cat", "dog"), student) == (0, 1, 2, 3)
    assert class_positions(named("cat"), student) == (2,)


@pytest.mark.parametrize(
    ("own", "student"),
    [
        (named(count=3), named(count=3)),
        (named(count=3), named("ant", "bee", "cat")),
        (named("x", "y", "z"), named(count=3)),
    ],
)
def test_classes_without_names_are_the_students_in_its_order(own, student):
    assert class_positions(own, student) == (0, 1, 2)


@pytest.mark.parametrize(
    ("own", "student", "reason"),
    [
        (named("ant", "fox", "gnu"), named("ant", "bee"), "class_names: got .*'fox', 'gnu'.*ant.*bee"),
        (named("ant", "ant"), named("ant", "bee"), "class_names: got .*'ant', 'ant'.*different names"),
        (named("Ant"), named("ant", "bee"), "class_names: got .*Ant"),
        (named(count=2), named("ant", "bee", "cat"), "num_classes: got 2, allowed: 3, where classes have no names"),
        (named("ant", "bee"), named(count=3), "num_classes: got 2, allowed: 3"),
        (named(count=4), named(count=3), "num_classes: got 4, allowed: 3"),
    ],
)
def test_classes_that_the_student_does_not_have_are_refused(own, student, reason):
    with pytest.raises(SettingError, match=reason):
        class_positions(own, student)


def test_a_union_of_classes_keeps_the_order_in_which_they_come():
    assert union_of_classes([named("bee", "ant"), named(count=3), named("cat", "ant", "dog")]) == (
        "bee", "ant", "cat", "dog",
    )  # fmt: skip
    assert union_of_classes([]) == ()
    specs = [named("bee", "ant"), named("cat", "bee")]
    student = named(*union_of_classes(specs))
    assert [class_positions(spec, student) for spec in specs] == [(0, 1), (2, 0)]


def test_counts_go_to_the_students_classes():
    model = small_vit()
    teacher = TrainedTeacher("a", model, 15, (1, 2, 3, 4, 5), classes=(6, 1, 0, 3, 5), num_classes=7)
    assert teacher.aligned_counts == (3, 2, 0, 4, 0, 5, 1)
    assert TrainedTeacher("a", model, 15, (1, 2, 3, 4, 5)).aligned_counts == (1, 2, 3, 4, 5)
    assert TrainedTeacher("a", model, 5, (1, 2, 3, 4, 5)).aligned_counts == pytest.approx([n / 3 for n in range(1, 6)])
    untold = TrainedTeacher("a", model, 20, None, classes=(6, 1, 0, 3, 5), num_classes=7)
    assert untold.aligned_counts == (4, 4, 0, 4, 0, 4, 4)
    assert teacher.aligned(photos()).shape == (2, 7)
