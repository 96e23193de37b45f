"""Attacks on membership by hand, over data whose members are known."""

import json
import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod

from smi_fed.audit import AuditConfig, audited, confidences, leak_of, likelihood_ratios
from smi_fed.audit.findings import _ratios
from smi_fed.audit.local_privacy import LocalPrivacy, release
from smi_fed.audit.nearest import WINDOW, cosines, nearness, resemblance, ssim
from smi_fed.audit.worlds import HELD_BY, Recipe, World, memberships, with_canaries, world
from smi_fed.data import ImageSet
from smi_fed.distillation import DistillationConfig
from smi_fed.inversion import InversionConfig
from smi_fed.pipeline import PipelineConfig
from smi_fed.training_config import TrainingConfig
from tests.models import small_spec, small_vit


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def test_confidence_is_the_log_odds_of_the_own_class():
    logits, labels = torch.randn(20, 5, generator=drawn()), torch.arange(20) % 5
    odds = logits.double().softmax(1)[range(20), labels]
    torch.testing.assert_close(confidences(logits, labels), (odds / (1 - odds)).log())
    sure = confidences(torch.tensor([[200.0, 0.0], [0.0, 200.0]]), torch.tensor([0, 0]))
    assert sure.tolist() == [200.0, -200.0]  # the odds themselves would overflow


def test_the_ratio_is_that_of_two_gaussians():
    seen, shadows = torch.randn(4, generator=drawn()).double(), torch.randn(6, 4, generator=drawn(1)).double()
    inside = memberships(6, 4, drawn(2))
    inside[:, 0] = torch.arange(6) < 2  # of the four without it the first two count
    counted = torch.ones_like(inside)
    counted[4:, 0] = False
    expected = torch.zeros(4).double()
    for sign, chosen in ((1, inside & counted), (-1, ~inside & counted)):
        means = [shadows[chosen[:, n], n].mean() for n in range(4)]
        variance = fmean(
            float((shadows[row, n] - means[n]) ** 2) for n in range(4) for row in range(6) if chosen[row, n]
        )
        for n in range(4):
            log = -((seen[n] - means[n]) ** 2) / 2 / variance - math.log(2 * math.pi * variance) / 2
            expected[n] += sign * log
    torch.testing.assert_close(likelihood_ratios(seen, shadows, inside), expected)
    with pytest.raises(ValueError, match="each example inside of one model at least"):
        likelihood_ratios(seen, shadows, torch.ones_like(inside))


@pytest.mark.parametrize("worlds", [4, 6, 16])
def test_where_nothing_leaks_nothing_is_found(worlds):
    seen, inside = torch.randn(worlds, 3000, generator=drawn()).double(), memberships(worlds, 3000, drawn(1))
    assert leak_of(_ratios(seen, inside).flatten(), inside.flatten()).auc == pytest.approx(0.5, abs=0.015)


def test_a_leak_is_judged_where_few_others_are_taken_for_members():
    member = torch.arange(4000) < 2000
    scores = torch.zeros(4000)
    scores[:200] = 2.0  # a tenth of the members, and one of the others
    scores[2000] = 3.0
    found = leak_of(scores, member)
    assert found.found == {0.001: 0.1, 0.01: 0.1}
    assert found.auc == pytest.approx(0.55, abs=1e-3)
    assert (found.members, found.others) == (2000, 2000)


def test_every_example_is_in_half_of_the_worlds_and_canaries_lie():
    inside = memberships(6, 50, drawn())
    assert inside.sum(0).tolist() == [3] * 50
    assert len({tuple(row) for row in inside.T.tolist()}) > 1
    labels = torch.arange(50) % 5
    data = ImageSet(torch.rand(50, 1, 8, 8), labels, tuple("abcde"))
    marked, canary = with_canaries(data, 7, drawn())
    assert int(canary.sum()) == 7
    assert torch.equal(marked.labels != labels, canary)


def test_ssim_is_the_mean_over_windows():
    first = torch.rand(2, 1, 9, 9, generator=drawn()).double()
    second = torch.rand(3, 1, 9, 9, generator=drawn(1)).double()
    expected = torch.zeros(2, 3).double()
    for i, j in ((i, j) for i in range(2) for j in range(3)):
        values = []
        for y, x in ((y, x) for y in range(9 - WINDOW + 1) for x in range(9 - WINDOW + 1)):
            a, b = (each[0, y : y + WINDOW, x : x + WINDOW] for each in (first[i], second[j]))
            together = ((a - a.mean()) * (b - b.mean())).mean()
            top = (2 * a.mean() * b.mean() + 1e-4) * (2 * together + 9e-4)
            low = (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var(correction=0) + b.var(correction=0) + 9e-4)
            values.append(float(top / low))
        expected[i, j] = fmean(values)
    torch.testing.assert_close(ssim(first, second), expected)
    assert ssim(first, first).diagonal().tolist() == pytest.approx([1.0, 1.0])


def test_nearer_is_whose_neighbour_is_nearer_among_as_many():
    training = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.5, 0.5]])
    others = torch.tensor([[0.8, 0.7, 1.0], [0.4, 0.1, 1.0], [0.5, 0.1, 1.0]])  # the third one is one too many
    found = nearness(training, others)
    assert found.nearer == 0.5  # one nearer, one not, one as near
    assert found.training == pytest.approx((0.9 + 0.3 + 0.5) / 3)
    assert found.held_out == pytest.approx((0.8 + 0.4 + 0.5) / 3)
    assert float(cosines(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))) == pytest.approx(math.sqrt(0.5))


def test_who_is_shown_by_an_image_of_its_label_is_found_by_images_alone():
    inside, looks = memberships(16, 40, drawn()), torch.rand(40, 1, 12, 12, generator=drawn(1))
    labels = torch.arange(40) % 4
    planted = torch.arange(40) < 10  # these are shown where they are members, the others never are
    seen = []
    for number, members in enumerate(inside):
        noise = torch.rand(20, 1, 12, 12, generator=drawn(2 + number))
        rows = (members & planted).nonzero()[:, 0]
        shown = torch.cat([noise, 0.7 * looks[rows] + 0.3 * noise[: len(rows)]])
        targets = torch.cat([torch.arange(20) % 4, labels[rows]])
        seen.append(resemblance(ssim(shown, looks), targets, labels))
    ratios = _ratios(torch.stack(seen), inside)
    assert leak_of(ratios[:, planted].flatten(), inside[:, planted].flatten()).found[0.01] > 0.95
    assert abs(leak_of(ratios[:, ~planted].flatten(), inside[:, ~planted].flatten()).auc - 0.5) < 0.15
    similar = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    assert resemblance(similar, torch.tensor([0, 1]), torch.tensor([1, 2])).tolist() == pytest.approx([0.2, -1.0])


def by_flower(start, trained, *arguments):
    """What Flower's mod makes of a client's reply."""
    asked, reply = (
        SimpleNamespace(content=RecordDict({"arrays": ArrayRecord(each)}), has_error=lambda: False)
        for each in (start, trained)
    )
    found: Any = LocalDpMod(*arguments)
    return found(asked, None, lambda *_: reply).content["arrays"].to_torch_state_dict()


def test_an_update_is_clipped_as_flower_does_it():
    model, start = small_vit(seed=1), small_vit(seed=2).state_dict()
    start = {name: value.clone() for name, value in start.items()}
    theirs = by_flower(start, model.state_dict(), 0.5, 0.0, 1.0, 1e-5)
    release(model, start, LocalPrivacy(0.5, 0.0, 1.0), drawn())
    for name, value in theirs.items():
        torch.testing.assert_close(model.state_dict()[name], value)
    moved = sum(float((value - start[name]).square().sum()) for name, value in model.state_dict().items())
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-3)


def test_noise_is_as_wide_as_flowers_and_of_a_generator():
    start = {name: value.clone() for name, value in small_vit(seed=1).state_dict().items()}
    privacy, found = LocalPrivacy(1.0, 2.0, 8.0, 1e-6), []
    for seed in (0, 0, 1):
        model = small_vit(seed=1)
        release(model, start, privacy, drawn(seed))
        found.append(torch.cat([(value - start[name]).flatten() for name, value in model.state_dict().items()]))
    assert torch.equal(found[0], found[1])
    np.random.seed(0)  # noqa: NPY002 - Flower draws from there
    theirs = by_flower(start, {name: value + 1e-9 for name, value in start.items()}, 1.0, 2.0, 8.0, 1e-6)
    flowers = float(torch.cat([(value - start[name]).flatten() for name, value in theirs.items()]).std())
    assert privacy.deviation == pytest.approx(2 * np.sqrt(2 * np.log(1.25 / 1e-6)) / 8)
    assert [float(each.std()) for each in found] == pytest.approx([privacy.deviation] * 3, rel=0.05)
    assert flowers == pytest.approx(privacy.deviation, rel=0.05)


def test_a_model_that_learns_by_heart_gives_its_members_away():
    spec, model = small_spec(), small_vit()
    pixels = torch.rand(80, len(model.mean), *model.image_size, generator=drawn())
    data = ImageSet(pixels, torch.arange(80) % 5, tuple("abcde"))
    inversion = InversionConfig.paper(iterations=2, schedule="1:0.5", jitter=0)
    pipeline = PipelineConfig(4, inversion, DistillationConfig(steps=2, batch_size=4))
    training = TrainingConfig(steps=120, batch_size=40, optimiser="adamw", learning_rate=2e-3, jitter=0)
    recipe = Recipe(spec, spec, training, pipeline, statistics=False)
    found = audited(recipe, data, data, AuditConfig(worlds=4, canaries=10))
    assert found.examples["model"].auc > 0.9  # labels of noise can only be learned by heart
    assert abs(found.examples["student"].auc - 0.5) < 0.2  # two steps tell nothing
    assert (found.canaries["model"].members, found.canaries["model"].others) == (20, 20)
    assert found.plain()["worlds"] == 4
    assert found.accuracy["model on its own"] > 0.9
    assert list(found.examples) == list(HELD_BY)
    noised = replace(recipe, privacy=LocalPrivacy(1.0, 2.0, 1.0))
    lost = world(noised, data, data, AuditConfig(worlds=4, canaries=10), seed=0, number=1)
    assert lost.accuracy["model on its own"] < 0.5  # noise is all there is
    again = World.read(json.loads(json.dumps(lost.plain())))
    assert torch.equal(again.seen["images"], lost.seen["images"])
    assert torch.equal(again.members, lost.members)
    assert again.near == lost.near
