"""Attacks on membership by hand, over data whose members are known."""

import math
from statistics import fmean

import pytest
import torch

from smi_fed.audit import AuditConfig, audited, confidences, leak_of, likelihood_ratios
from smi_fed.audit.nearest import WINDOW, cosines, nearness, ssim
from smi_fed.audit.worlds import Recipe, _ratios, memberships, with_canaries
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
