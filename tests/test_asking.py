"""A few teachers stand for all of them, and in the mean they say the same."""

from dataclasses import replace

import pytest
import torch

from smi_fed.distillation import distill, ensemble_answers, ensemble_weights
from smi_fed.distillation.asking import Asking, sampled_answers
from smi_fed.pipeline import distill_student
from smi_fed.teachers import TrainedTeacher
from tests.models import small_vit
from tests.test_distillation import fresh, same_weights, seeded
from tests.test_distillation_in_turn import CONFIG
from tests.test_sparse_images import sparse

TEACHERS, CLASSES, IMAGES = 9, 4, 12


def asking(others=3, columns=CLASSES):
    generator = seeded(3)
    weights = torch.rand(TEACHERS, columns, generator=generator) ** 3
    owners = torch.randint(-1, TEACHERS, (IMAGES,), generator=generator)
    classes = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return Asking(owners, classes, weights / weights.sum(0), others)


@pytest.mark.parametrize("columns", [1, CLASSES])
@pytest.mark.parametrize("mixed", [False, True])
def test_in_the_mean_each_teacher_stands_for_itself(mixed, columns):
    known, rows, generator = asking(columns=columns), torch.arange(8), seeded(5)
    partners = torch.arange(8).flip(0) if mixed else None
    draws = torch.stack([known.draw(rows, partners, generator) for _ in range(6000)]).double()
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert bool(((mean - 1).abs() <= 5 * error + 1e-9).all())
    assert float(error.max()) < 0.05


@pytest.mark.parametrize("mixed", [False, True])
def test_an_images_own_teachers_are_heard_as_they_are_and_few_others_are_asked(mixed):
    known, rows = asking(), torch.arange(8)
    partners = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]) if mixed else None
    stands = known.draw(rows, partners, seeded())
    for place in range(8):
        whose = {int(known.owners[place])} | ({int(known.owners[partners[place]])} if mixed else set())
        assert all(stands[owner, place] == 1 for owner in whose - {-1})
        others = [stands[i, place] for i in range(TEACHERS) if i not in whose]
        assert 1 <= sum(each > 0 for each in others) <= 3


def test_whom_the_class_suggests_is_drawn_more_often():
    weights = torch.tensor([[0.0], [0.9], [0.1], [0.0]]).expand(-1, 2)
    known = Asking(torch.zeros(1000, dtype=torch.long), torch.zeros(1000, dtype=torch.long), weights, 1)
    often = (known.draw(torch.arange(1000), None, seeded()) > 0).float().mean(1)
    assert often[0] == 1
    # Half of the draws is even over the three others, half goes by 0.9 and 0.1.
    assert torch.allclose(often[1:], torch.tensor([1 / 6 + 0.45, 1 / 6 + 0.05, 1 / 6]), atol=0.05)


@pytest.mark.parametrize("by_certainty", [False, True])
def test_answers_of_some_are_the_sum_over_those(by_certainty):
    """Against a loop over images; where all are asked once it is the whole ensemble."""
    teachers, views = [small_vit(seed) for seed in range(3)], [torch.rand(4, 3, 16, 16), torch.rand(2, 3, 16, 16)]
    weights = ensemble_weights("class", [1] * 3, torch.rand(3, 5, generator=seeded()).tolist())
    whole = ensemble_answers(teachers, views, weights, 2.0, by_certainty=by_certainty)
    ones = [torch.ones(3, len(view)) for view in views]
    found = sampled_answers(teachers, views, weights, 2.0, ones, by_certainty=by_certainty)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b)
    asked = [torch.tensor([[1.0, 0, 2.5, 0], [0, 1, 1, 0], [0, 0, 0.5, 1]]), torch.tensor([[0.0, 1], [0, 1], [3, 0]])]
    found = sampled_answers(teachers, views, weights, 2.0, asked, by_certainty=by_certainty)
    for view, stands, answers in zip(views, asked, found, strict=True):
        for place, image in enumerate(view):
            share = torch.zeros(5)
            for teacher, weight, times in zip(teachers, weights, stands[:, place], strict=True):
                with torch.no_grad():
                    logits = teacher(image[None])[0]
                own = logits.softmax(-1)
                sure = (own * own.log()).sum().exp() if by_certainty else 1.0
                share += times * sure * weight * (logits / 2).softmax(-1)
            torch.testing.assert_close(answers[place], share / share.sum())


def federation(count):
    return [small_vit(seed) for seed in range(count)], [sparse(3, seed=seed) for seed in range(count)]


def asked_in(teachers, images, config, **options):
    """How many images each teacher was shown."""
    seen = [0] * len(teachers)

    def count(number):
        def hook(_model, given, _output):
            seen[number] += len(given[0])

        return hook

    hooks = [teacher.register_forward_hook(count(number)) for number, teacher in enumerate(teachers)]
    student = fresh()
    distill(student, teachers, images, config, generator=seeded(), **options)
    for hook in hooks:
        hook.remove()
    return seen, student.state_dict()


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.0, "jitter": 0, "steps": 9}, {"validation": 0.4}])
def test_the_work_for_an_image_does_not_grow_with_teachers(changes):
    config = replace(CONFIG, others=2, **changes)
    totals = {}
    for count in (6, 12):
        teachers, images = federation(count)
        owners = torch.arange(count).repeat_interleave(3)
        seen, _ = asked_in(teachers, images, config, owners=owners)
        everything, _ = asked_in(teachers, images, replace(config, others=None), owners=owners)
        shown = everything[0]
        assert everything == [shown] * count
        totals[count] = sum(seen) / shown
        own = 1 if "mixup" in changes else 2
        assert totals[count] <= own + 2
    assert totals[12] <= 1.25 * totals[6]


@pytest.mark.parametrize("others", [4, 5, 7])
def test_of_few_teachers_all_are_asked_and_nothing_is_drawn(others):
    teachers, images = federation(6)
    owners = torch.arange(6).repeat_interleave(3)
    _, student = asked_in(teachers, images, replace(CONFIG, others=others), owners=owners)
    _, usual = asked_in(teachers, images, replace(CONFIG, others=None))
    assert same_weights(student, usual)


def test_without_owners_or_a_mean_all_are_asked():
    teachers, images = federation(6)
    few = replace(CONFIG, others=1)
    assert len(set(asked_in(teachers, images, few)[0])) == 1
    owners = torch.arange(6).repeat_interleave(3)
    assert len(set(asked_in(teachers, images, replace(few, robust="median"), owners=owners)[0])) == 1
    assert len(set(asked_in(teachers, images, few, owners=owners)[0])) > 1


def test_the_pipeline_says_whose_images_are_whose(monkeypatch):
    """Teacher 1 is left out; images of an earlier round are nobody's."""
    noted = {}

    def noting(*_, owners, **__):
        noted["owners"] = owners.tolist()

    monkeypatch.setattr("smi_fed.pipeline.distill", noting)
    teachers = [TrainedTeacher(f"t{i}", small_vit(i), 10, (1,) * 5) for i in range(3)]
    images = [sparse(2, seed=i) for i in range(3)]
    distill_student(fresh(), teachers, images, CONFIG, seeded(), factors=[1.0, 0.0, 0.5])
    assert noted["owners"] == [0, 0, -1, -1, 1, 1]
