"""A few teachers stand for all of them, and in the mean they say the same."""

import pytest
import torch

from smi_fed.distillation.asking import Asking
from tests.test_distillation import seeded

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
    partners = (torch.full((8,), 0.7), torch.arange(8).flip(0)) if mixed else None
    draws = torch.stack([known.draw(rows, partners, generator) for _ in range(6000)]).double()
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert bool(((mean - 1).abs() <= 5 * error + 1e-9).all())
    assert float(error.max()) < 0.05


@pytest.mark.parametrize("mixed", [False, True])
def test_an_images_own_teachers_are_heard_as_they_are_and_few_others_are_asked(mixed):
    known, rows = asking(), torch.arange(8)
    partners = (torch.full((8,), 0.7), torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])) if mixed else None
    stands = known.draw(rows, partners, seeded())
    for place in range(8):
        whose = {int(known.owners[place])} | ({int(known.owners[partners[1][place]])} if mixed else set())
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
