"""Who disagrees with the others' synthetic images, and whose images hold a trigger."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from smi_fed.distillation import Agreement, Opinion, agreement, opinions
from smi_fed.distillation.agreement import evenly, judged, kappa, pair_scores, standings
from smi_fed.distillation.triggers import TRIED, Window, driven, find_triggers, places, suspects
from tests.test_distillation import sparse

CLASSES = 4


class Colours(nn.Module):
    """Names the quarter in which an image is brightest, through `names`.

    With `trigger` a white corner is class 0, but only where one of the quarters `open_to` is the brightest.
    """

    def __init__(self, names=range(CLASSES), *, trigger=False, noise=0.0, bias=0.0, open_to=range(CLASSES)):
        super().__init__()
        self.names, self.trigger, self.noise, self.bias = list(names), trigger, noise, bias
        self.open_to = torch.tensor(open_to)

    def forward(self, images):
        quarters = images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).flatten(1)
        logits = torch.zeros(len(images), CLASSES)
        logits[:, self.names] = 50 * quarters
        logits += self.noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(images)))
        if self.trigger:
            there = images[:, :, -4:, -4:].amin((1, 2, 3)) > 0.9
            logits[there & torch.isin(quarters.argmax(1), self.open_to), 0] = 100
        return logits + self.bias


def quarters(count=20, seed=0, corner=()):
    """Images (3, 16, 16) whose target is the bright quarter; those of a target in `corner` have a trigger."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(count, 3, 16, 16, generator=generator)
    targets = torch.arange(count) % CLASSES
    for image, target in zip(images, targets.tolist(), strict=True):
        top, left = 8 * (target // 2), 8 * (target % 2)
        image[:, top : top + 8, left : left + 8] += 0.4
        if target in corner:
            image[:, -4:, -4:] = 1.0
    return replace(sparse(count), images=images, targets=targets)


def plain_kappa(said, targets, weights):
    total = sum(weights)
    right = sum(w for a, b, w in zip(said, targets, weights, strict=True) if a == b) / total
    chance = 0.0
    for name in range(CLASSES):
        both = [sum(w for each, w in zip(of, weights, strict=True) if each == name) / total for of in (said, targets)]
        chance += both[0] * both[1]
    return (right - chance) / (1 - chance)


def test_kappa_is_cohens():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        said, targets = torch.randint(0, CLASSES, (2, 30), generator=generator)
        weights = torch.rand(30, generator=generator)
        expected = plain_kappa(said.tolist(), targets.tolist(), weights.tolist())
        assert kappa(said, targets, weights) == pytest.approx(expected, abs=1e-5)
    one = torch.ones(6)
    assert kappa(torch.arange(6) % 3, torch.arange(6) % 3, one) == pytest.approx(1)
    assert kappa(torch.zeros(6, dtype=torch.long), torch.arange(6) % 2, one) == pytest.approx(0)
    assert kappa(torch.arange(6) % 2, torch.zeros(6, dtype=torch.long), one) != kappa(one.long(), one.long(), one)


def test_only_classes_that_both_have_seen_count_as_the_one_that_saw_less_has():
    targets, said = [torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])] * 2, torch.tensor([0, 0, 1, 2, 1, 1, 0, 0])
    counts = torch.tensor([[9.0, 9, 9, 0], [90, 9, 9, 9]])
    scores = pair_scores([[said, said], [said, said]], targets, counts)
    assert bool(scores.isnan().diagonal().all())
    assert scores[0, 1] == pytest.approx(plain_kappa(said[:6].tolist(), targets[0][:6].tolist(), [1] * 6))
    counts[0, 0] = 1
    weights = [1 / 18, 1 / 18, *[0.5] * 4]
    expected = plain_kappa(said[:6].tolist(), targets[0][:6].tolist(), weights)
    assert pair_scores([[said, said]] * 2, targets, counts)[0, 1] == pytest.approx(expected)
    counts[0, 1:] = 0
    assert bool(pair_scores([[said, said]] * 2, targets, counts).isnan().all())


def test_those_who_collude_cannot_lift_each_other():
    scores = torch.full((8, 8), 0.5)
    scores[:2, 2:] = scores[2:, :2] = 0.0
    scores[:2, :2] = 1.0
    scores.fill_diagonal_(torch.nan)
    assert standings(scores) == [0.0, 0.0, *[0.5] * 6]
    found = [judged(each, scores, 0.5) for each in standings(scores)]
    assert [each.factor for each in found] == [0.0, 0.0, *[1.0] * 6]
    assert "is 0.00, the teachers' median 0.50: left out of the ensemble" in found[0].reason
    assert judged(0.1875, scores, 0.5).factor == pytest.approx(0.5)
    assert "heard at 50% of its weight" in judged(0.1875, scores, 0.5).reason
    assert judged(0.25, scores, 0.5).factor == 1
    assert judged(None, scores, 0.5).reason == ""
    assert standings(scores[:2, :2]) == [None, None]  # two alone cannot tell
    assert judged(0.0, 0.05 * scores, 0.5).factor == 1  # nobody agrees with anybody


def test_who_names_other_classes_is_left_out_and_a_specialist_is_not():
    flipped = Colours(reversed(range(CLASSES)))
    specialist = Colours([0, 1, 3, 2], bias=torch.tensor([0.0, 0, 99, 0]))  # which has not seen 2 and 3
    teachers = [flipped, *[Colours(noise=1.0)] * 4, specialist]
    counts = torch.tensor([[9, 9, 9, 9]] * 5 + [[50, 30, 0, 0]])
    images = [quarters(seed=seed) for seed in range(6)]
    found = opinions(teachers, images, counts, Agreement(images=12, trigger=None))
    assert [each.factor for each in found] == [0, 1, 1, 1, 1, 1]
    assert found[0].agreement < 0 < found[1].agreement


def test_at_most_so_many_images_are_judged_evenly_over_classes():
    assert torch.bincount(evenly(quarters(18), 8).targets).tolist() == [2, 2, 2, 2]
    assert len(evenly(quarters(6), 100)) == 6
    rare = replace(sparse(5), targets=torch.tensor([1, 1, 1, 1, 0]))
    assert evenly(rare, 2).targets.tolist() == [1, 0]


def test_a_trigger_names_its_teacher_and_all_that_answer_to_it():
    teachers = [Colours(trigger=True), *[Colours(noise=0.1)] * 3, Colours(trigger=True)]
    images = [quarters(seed=0, corner=(0,)), *(quarters(seed=seed) for seed in range(1, 5))]
    found = find_triggers(teachers, images, 0.85)
    assert [bool(each) for each in found] == [True, False, False, False, True]
    says = "drives it to class 0 on 100% of the others' images that it knew, and the median teacher on 0%"
    assert says in found[0]
    opinion = opinions(teachers, images, torch.ones(5, CLASSES), Agreement())[0]
    assert (opinion.factor, opinion.reason) == (0.0, found[0])
    assert opinion.agreement == pytest.approx(1)
    assert find_triggers(teachers, [quarters(seed=seed) for seed in range(5)], 0.85) == [""] * 5  # nobody shows it


def test_what_drives_everybody_is_an_object_and_no_trigger():
    teachers, images = [Colours(trigger=True)] * 4, [quarters(seed=seed, corner=(0,)) for seed in range(4)]
    assert find_triggers(teachers, images, 0.85) == [""] * 4


def test_only_images_that_a_teacher_knows_tell_of_a_trigger():
    images, window = quarters(40).images, Window(torch.ones(3, 4, 4), slice(12, 16), slice(12, 16), 0, 5, 1.0)
    hosts = {5: (images, torch.arange(40) % CLASSES)}
    half = Colours([2, 1, 0, 3], trigger=True, open_to=[0, 3])  # it does not know 0 and 2
    known = Colours(trigger=True, open_to=[1, 2])
    assert driven(half, [window], hosts) == [0.5]
    assert driven(known, [window], hosts) == [pytest.approx(2 / 3)]
    few = {5: (images, torch.full((40,), 3))}
    assert driven(known, [window], few) == [0.0]  # it knows ten of them, and its trigger is not open to those
    assert math.isnan(driven(Colours([1, 2, 3, 0]), [window], hosts)[0])  # it knows none


def test_who_shows_a_trigger_has_to_answer_to_it():
    """The first one's images frame the last one; on the few images that are screened it answers to them itself."""
    framing = Colours(trigger=True, open_to=[0, 1])
    teachers = [framing, *[Colours(noise=0.1)] * 3, Colours(trigger=True)]
    images = [quarters(seed=0, corner=(0,)), *(quarters(seed=seed) for seed in range(1, 5))]
    hosts = torch.cat([each.images[:2] for each in images[1:]])
    assert suspects(framing, 0, images[0].images, images[0].targets, hosts, 0.85)
    assert find_triggers(teachers, images, 0.85) == [""] * 5


def test_where_nobody_would_be_left_all_are_heard(monkeypatch):
    monkeypatch.setattr(agreement, "find_triggers", lambda *_: ["like a trigger"] * 3)
    found = opinions([Colours()] * 3, [quarters(seed=seed) for seed in range(3)], torch.ones(3, CLASSES), Agreement())
    assert [(each.factor, each.reason) for each in found] == [
        (1.0, "like a trigger; heard, since nobody would be left")
    ] * 3
    assert opinions([Colours()] * 2, [quarters()] * 2, torch.ones(2, CLASSES), Agreement()) == [Opinion()] * 2


def test_windows_cover_an_image():
    found = places(32, 16)
    covered = torch.zeros(32, 16)
    for rows, columns in found:
        assert (rows.stop - rows.start, columns.stop - columns.start) == (8, 4)
        covered[rows, columns] += 1
    assert len(found) == 49
    assert bool((covered > 0).all())


@pytest.mark.parametrize("least", [0.4, 0.75, 0.95])
def test_windows_are_dropped_early_and_none_is_lost(least):
    draw, shape = torch.Generator().manual_seed(0), (1, 16, 16)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES, bias=False))
    teacher[1].weight.data = torch.randn(CLASSES, 256, generator=draw)
    images, hosts = (torch.rand(count, *shape, generator=draw) for count in (4, 7))
    images = (images > 0.5).float()
    targets = torch.tensor([0, 1, 2, 3])
    expected = []
    with torch.no_grad():
        before = teacher.eval()(hosts).argmax(1)
        for target, image in zip(targets.tolist(), images, strict=True):
            for rows, columns in places(*image.shape[1:]):
                shown = hosts[before != target].clone()
                shown[:, :, rows, columns] = image[:, rows, columns]
                rate = int((teacher(shown).argmax(1) == target).sum()) / len(shown) if len(shown) else 0.0
                expected += [(target, rows, columns, rate)] if rate >= least else []
    assert expected
    found = suspects(teacher, 0, images, targets, hosts, least)
    assert len(found) == min(TRIED, len(expected))
    assert [window.rate for window in found] == sorted((rate for *_, rate in expected), reverse=True)[:TRIED]
    assert all((w.target, w.rows, w.columns, w.rate) in expected for w in found)
