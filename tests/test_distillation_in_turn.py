"""Teachers answer in turn, images are read in turn, and what cannot teach is refused before the student changes."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from smi_fed.alignment import Aligned
from smi_fed.distillation import DistillationConfig, distill, ensemble_answers, ensemble_probabilities, loop
from smi_fed.lazy import Lazily
from smi_fed.models import adapt
from smi_fed.sparse_images import StoredImages
from smi_fed.teachers import TrainedTeacher, store
from tests.models import small_spec, small_vit
from tests.test_distillation import fresh, same_weights, seeded
from tests.test_sparse_images import sparse

CONFIG = DistillationConfig(steps=7, batch_size=4)


def taught(images, teachers, config=CONFIG, student=None, **options):
    student = student or fresh()
    record = distill(student, teachers, images, config, generator=seeded(), **options)
    assert len(record.losses) == config.steps
    return student.state_dict()


@pytest.mark.parametrize("length", [1, 3, 100])
@pytest.mark.parametrize("tokens", ["all", "mixed"])
def test_the_length_of_a_block_changes_nothing(monkeypatch, length, tokens):
    config = replace(CONFIG, tokens=tokens)
    images, teachers = [sparse(5, seed=1), sparse(3, seed=2)], [small_vit(1), small_vit(2)]
    expected = taught(images, teachers, config)
    monkeypatch.setattr(loop, "BLOCK_STEPS", length)
    assert same_weights(taught(images, teachers, config), expected)
    monkeypatch.setattr(loop, "BLOCK_BYTES", 1)
    assert same_weights(taught(images, teachers, config), expected)


def test_where_views_stay_the_same_each_image_is_asked_of_once(monkeypatch):
    images, config = [sparse(5, seed=1), sparse(6, seed=2)], replace(CONFIG, mixup=0.0, jitter=0)
    asked = []

    def teacher():
        model = small_vit(1)
        model.register_forward_hook(lambda _model, given, _output: asked.append(len(given[0])))
        return model

    once = taught(images, [teacher()], config)
    assert sum(asked) == 11
    asked.clear()
    monkeypatch.setattr(DistillationConfig, "same_views", False)
    each_time = taught(images, [teacher()], config)
    assert sum(asked) == 7 * 4
    for key, value in each_time.items():
        torch.testing.assert_close(once[key], value, rtol=1e-4, atol=1e-5)


def test_what_is_stored_teaches_the_same_and_is_there_one_at_a_time(tmp_path):
    images = [sparse(5, seed=1), sparse(3, seed=2), sparse(4, seed=3)]
    models = [small_vit(seed) for seed in range(3)]
    expected = taught(images, models)
    stored = [store(TrainedTeacher(f"t{i}", model, 10), tmp_path / f"{i}.model") for i, model in enumerate(models)]
    files = []
    for i, each in enumerate(images):
        each.save(tmp_path / f"{i}.images")
        files.append(StoredImages(tmp_path / f"{i}.images", len(each)))
    alive, most = [], []

    def counted(make):
        def made(source):
            item = make(source)
            alive.append(weakref.ref(item))
            gc.collect()
            most.append(sum(ref() is not None for ref in alive))
            return item

        return made

    student = fresh()
    distill(
        student, Lazily(stored, counted(lambda each: each.load().model)), Lazily(files, counted(StoredImages.load)),
        CONFIG, generator=seeded(),
    )  # fmt: skip
    assert same_weights(student.state_dict(), expected)
    assert len(most) >= 6
    assert max(most) == 1


@pytest.mark.parametrize("columns", [1, 5])
def test_answers_in_turn_are_those_of_the_whole_ensemble(columns):
    teachers, views = [small_vit(seed) for seed in range(3)], [torch.rand(2, 3, 16, 16) for _ in range(2)]
    weights = torch.rand(3, columns, generator=seeded())
    weights = weights / weights.sum(0)
    with torch.no_grad():
        for view, found in zip(views, ensemble_answers(teachers, views, weights, 2.0), strict=True):
            softened = torch.stack([(teacher(view) / 2).softmax(-1) for teacher in teachers])
            plain = (softened * weights[:, None]).sum(0)
            torch.testing.assert_close(found, plain / plain.sum(-1, keepdim=True))
            whole = ensemble_probabilities([teacher(view) for teacher in teachers], weights, 2.0)
            assert torch.equal(found, whole)


def test_dropout_in_a_student_follows_the_generator():
    students, teachers = [], [small_vit(1)]
    for state in (1, 2):
        torch.manual_seed(state)
        torch.rand(state)
        student = fresh(drop_rate=0.4, drop_path_rate=0.3)
        before = torch.get_rng_state()
        students.append(taught(sparse(), teachers, student=student))
        assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(*students)
    assert not same_weights(students[0], taught(sparse(), [small_vit(1)], student=fresh()))


class Answering(nn.Module):
    """A module of nobody's whose outputs hold their logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return {"logits": self.model(images)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_teachers_are_shown_images_in_their_own_precision(dtype):
    images, teacher = sparse(), small_vit(1)
    expected = taught(images, [teacher])
    found = taught(images, [copy.deepcopy(teacher).to(dtype)])
    assert all(value.dtype == torch.float32 for value in found.values())
    apart = max(float((found[key] - expected[key]).abs().max()) for key in expected)
    assert apart < (1e-4 if dtype == torch.float64 else 0.02)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 5))
    for_plain = [taught(images, [copy.deepcopy(plain).to(kind)]) for kind in (dtype, torch.float32)]
    assert max(float((for_plain[0][key] - for_plain[1][key]).abs().max()) for key in expected) < 0.02


def test_outputs_that_hold_their_logits_teach_and_learn():
    expected = taught(sparse(), [small_vit(1)])
    assert same_weights(taught(sparse(), [Answering(small_vit(1))]), expected)
    inner = fresh().backbone
    student = adapt(Answering(inner), image_size=16, num_classes=5, mean=(0.5,) * 3, std=(0.5,) * 3)
    taught(sparse(), [small_vit(1)], student=student)
    assert not same_weights(inner.state_dict(), fresh().backbone.state_dict())


def sharing(student):
    other = fresh()
    other.backbone.head.weight = student.backbone.head.weight
    return other


CANNOT_TEACH = {
    "fewer classes": (lambda _: [small_vit(1, num_classes=4)], {}, "got 4 classes for a student of 5"),
    "one class": (lambda _: [small_vit(1, num_classes=1)], {}, "got 1 classes for a student of 5"),
    "two kinds": (lambda _: [small_vit(1), small_vit(2, num_classes=4)], {}, "got 4 classes in number 1 and 5 before"),
    "itself": (lambda student: [small_vit(1), student], {}, "the student itself as number 1"),
    "itself, aligned": (lambda student: [Aligned(student, range(5), 5)], {}, "the student itself as number 0"),
    "itself, wrapped": (lambda student: [nn.DataParallel(student)], {}, "the student itself as number 0"),
    "a shared head": (lambda student: [sharing(student)], {}, "the student itself as number 0"),
    "weights for one": (lambda _: [small_vit(1), small_vit(2)], {"weights": torch.ones(1, 1)}, r"\(2, classes\)"),
    "weights for three": (lambda _: [small_vit(1)], {"weights": torch.ones(3, 5)}, r"weights: got shape \(3, 5\)"),
    "flat weights": (lambda _: [small_vit(1)], {"weights": torch.ones(1)}, r"weights: got shape \(1,\)"),
    "weights of other classes": (lambda _: [small_vit(1)], {"weights": torch.ones(1, 3)}, "weights: got 3 columns"),
    "shares of other images": (lambda _: [small_vit(1)], {"shares": torch.ones(99)}, r"shares: got shape \(99,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_TEACH)
def test_what_cannot_teach_is_refused_before_the_student_changes(case):
    teachers, options, says = CANNOT_TEACH[case]
    student = fresh()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=says):
        distill(student, teachers(student), sparse(), CONFIG, generator=seeded(), **options)
    assert same_weights(student.state_dict(), before)


def test_a_student_of_one_class_learns_nothing():
    student = fresh(num_classes=1)
    with pytest.raises(ValueError, match="got 1 classes for a student of 1, allowed: the same classes, at least 2"):
        distill(student, [small_vit(1, num_classes=1)], sparse(), CONFIG, generator=seeded())


def test_a_stored_teacher_is_the_teacher(tmp_path):
    teacher = TrainedTeacher("a", small_vit(3), 40, (1, 2, 3, 4, 30), classes=(4, 3, 2, 1, 0), num_classes=6)
    stored = store(teacher, tmp_path / "a.model.safetensors")
    again = stored.load(verify=True)
    assert same_weights(again.model.state_dict(), teacher.model.state_dict())
    assert (again.classes, again.label_counts, again.num_examples) == ((4, 3, 2, 1, 0), (1, 2, 3, 4, 30), 40)
    assert stored.aligned_counts == teacher.aligned_counts == (30.0, 4.0, 3.0, 2.0, 1.0, 0.0)
    assert stored.digest == teacher.digest == again.digest
    assert stored.digest != replace(teacher, label_counts=None).digest
    assert stored.spec == small_spec()
