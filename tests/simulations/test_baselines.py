"""Known methods beside ours: what their papers say, by hand; and the table."""

from dataclasses import replace

import pytest
import torch

from simulations.baselines import METHODS, STUDY
from simulations.baselines.dense import (
    ADVERSARIAL,
    NOISE,
    Generator,
    distill_by_generator,
    ensemble_log,
    generator_loss,
)
from simulations.baselines.feddf import public_pictures
from simulations.baselines.report import KNOWS, table
from simulations.runner.loop import parsed
from smi_fed.distillation import DistillationConfig
from smi_fed.pipeline import TrainedTeacher
from tests.models import small_vit


def team():
    return [
        TrainedTeacher(str(n), small_vit(n).eval(), 10, counts)
        for n, counts in enumerate([(4, 0, 1, 2, 0), (1, 3, 0, 2, 1)])
    ]


WEIGHTS = torch.tensor([[0.8, 0.0, 1.0, 0.5, 0.0], [0.2, 1.0, 0.0, 0.5, 1.0]])


def shown(count=6):
    model = small_vit()
    return torch.rand(count, len(model.mean), *model.image_size, generator=torch.Generator().manual_seed(0))


def test_the_ensemble_is_the_weighted_mean_of_probabilities():
    images, teachers = shown(), team()
    expected = []
    for image in images:
        votes = sum(WEIGHTS[n] * teachers[n].model(image[None])[0].softmax(0) for n in range(2))
        expected.append(votes / votes.sum())
    torch.testing.assert_close(ensemble_log(teachers, WEIGHTS, images, 1.0).exp(), torch.stack(expected))


def test_the_generators_loss_is_that_of_the_paper():
    images, teachers, student = shown(), team(), small_vit(7).eval()
    classes = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = 0.0
    for image, target in zip(images, classes, strict=True):
        said = ensemble_log(teachers, WEIGHTS, image[None], 1.0)[0]
        own = student(image[None])[0].log_softmax(0)
        differ = said.argmax() != own.argmax()
        expected += -said[target] - ADVERSARIAL * differ * (said.exp() * (said - own)).sum()
    torch.testing.assert_close(generator_loss(images, classes, student, teachers, WEIGHTS), expected / 6)


def test_a_generator_makes_images_and_its_student_learns_of_them():
    teachers, student = team(), small_vit(7)
    size, channels = student.image_size[0], len(student.mean)
    made = Generator(5, channels, size)(torch.randn(3, NOISE), torch.tensor([0, 1, 4]))
    assert made.shape == (3, channels, size, size)
    assert bool((made >= 0).all() and (made <= 1).all())
    before = [weight.clone() for weight in student.parameters()]
    theirs = [weight.clone() for each in teachers for weight in each.model.parameters()]
    config = DistillationConfig(steps=3, batch_size=8)
    distill_by_generator(student, teachers, config, torch.Generator().manual_seed(0))
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(theirs, (w for t in teachers for w in t.model.parameters()), strict=True)
    )
    again = small_vit(7)
    distill_by_generator(again, team(), config, torch.Generator().manual_seed(0))
    torch.testing.assert_close(list(again.parameters()), list(student.parameters()))


def test_public_pictures_are_grey_where_the_clients_are():
    settings = STUDY.compose(STUDY.words)
    found = public_pictures(settings, 20, torch.Generator().manual_seed(0))
    assert found.images.shape == (20, 1, 32, 32)
    assert set(found.teachers.tolist()) == {-1}
    other = public_pictures(
        replace(settings, data=replace(settings.data, channels=3)), 20, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(found.images, other.images.mean(1, keepdim=True))


def test_every_method_can_be_composed_and_is_told_of():
    assert set(KNOWS) == set(METHODS)
    for cell in STUDY.cells(parsed(STUDY, [])):
        STUDY.check(STUDY.compose((*STUDY.words, *cell.defaults, *cell.overrides)), cell)


def test_the_table_has_means_and_who_needs_what():
    line = {"client_seconds": 10.0, "server_seconds": 4.0, "bytes": 3_000_000}
    lines = [
        {"method": "ours", "seed": 0, "accuracy": 0.9, **line}, {"method": "ours", "seed": 1, "accuracy": 0.8, **line},
        {"method": "alone", "seed": 0, "accuracy": 0.5, "best": 0.7, **line},
    ]  # fmt: skip
    rows = table(lines)[0].rows
    assert rows[1][:5] == ["alone", "50.0 (best 70.0)", "10", "4", "3"]
    assert rows[2][:5] == ["ours", "85.0 ± 7.1", "10", "4", "3"]
    assert rows[2][6] == pytest.approx("models, and examples a class")
