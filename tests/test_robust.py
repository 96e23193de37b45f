"""Joining probabilities where some teachers may mean harm: against plain Python, and what has to hold of any."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.distillation import (
    Mean,
    Median,
    Trimmed,
    ensemble_answers,
    ensemble_probabilities,
    ensemble_weights,
)
from smi_fed.distillation.robust import bounded, trimmed_mean, weighted_median
from tests.models import small_vit

JOINED = {"mean": Mean(), "median": Median(most=0.4), "trimmed": Trimmed(cut=0.2, most=0.4)}


@st.composite
def votes(draw, least=1):
    """Probabilities (teachers, b, classes), and weights (teachers, classes) whose columns sum to 1; some are 0."""
    teachers, classes = draw(st.integers(least, 7)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(teachers, 3, classes, generator=generator, dtype=torch.float64) * draw(st.floats(0.1, 8))
    weights = torch.rand(teachers, classes, generator=generator, dtype=torch.float64)
    weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0
    weights[0, weights.sum(0) == 0] = 1
    return logits.softmax(-1), (weights / weights.sum(0))[:, None]


def plain_bounded(weights, most):
    """By bisection on what the weights are multiplied by before they are cut."""
    cap = max(most, 1 / sum(weight > 0 for weight in weights))
    low, high = 1.0, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sum(min(middle * w, cap) for w in weights) < 1 else (low, middle)
    return [min(high * weight, cap) for weight in weights]


def plain_quantiles(values, weights, cut):
    """(weighted median, trimmed mean) of numbers whose weights are a whole number of votes each."""
    many = sorted(itertools.chain(*([value] * weight for value, weight in zip(values, weights, strict=True))))
    middle = (many[(len(many) - 1) // 2] + many[len(many) // 2]) / 2
    kept = many[round(cut * len(many)) : len(many) - round(cut * len(many))]
    return middle, sum(kept) / len(kept)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=7))
def test_median_and_trimmed_mean_are_those_of_so_many_votes(drawn):
    values, number = [value for value, _ in drawn], [20 * weight for _, weight in drawn]
    number[0] = number[0] or 20
    found, weights = torch.tensor(values, dtype=torch.float64), torch.tensor(number, dtype=torch.float64)
    middle, trimmed = plain_quantiles(values, number, 0.05)
    assert float(weighted_median(found, weights / weights.sum())) == pytest.approx(middle)
    assert float(trimmed_mean(found, weights / weights.sum(), 0.05)) == pytest.approx(trimmed)


@settings(deadline=None)
@given(votes(), st.floats(0.05, 1))
def test_bounded_weights_are_those_of_bisection(drawn, most):
    weights = drawn[1][:, 0]
    found = bounded(weights, most)
    for column in range(weights.shape[1]):
        expected = torch.tensor(plain_bounded(weights[:, column].tolist(), most), dtype=torch.float64)
        torch.testing.assert_close(found[:, column], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(weights.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("kind", JOINED)
@settings(deadline=None, max_examples=50)
@given(votes())
def test_what_holds_however_teachers_are_joined(kind, drawn):
    probabilities, weights = drawn
    join = JOINED[kind].join
    found = join(probabilities, weights)
    heard = probabilities.where(weights > 0, torch.nan)  # a class that a teacher has not seen it is not asked of
    low, high = (heard.nan_to_num(nan=end) for end in (2.0, -1.0))
    assert bool(((found >= low.min(0).values - 1e-9) & (found <= high.max(0).values + 1e-9)).all())
    order = torch.randperm(len(probabilities))
    torch.testing.assert_close(join(probabilities[order], weights[order]), found)
    alike = probabilities[:1].expand_as(probabilities)
    torch.testing.assert_close(join(alike, weights), alike[0])


@settings(deadline=None, max_examples=50)
@given(votes(least=5), st.integers(0, 4))
def test_one_of_five_moves_the_median_no_further_than_the_others_go(drawn, who):
    probabilities = drawn[0][:5]
    weights = torch.full((5, 1, 1), 0.2, dtype=torch.float64)
    lie = torch.zeros_like(probabilities[0])
    lie[:, 0] = 1
    others = torch.cat([probabilities[:who], probabilities[who + 1 :]])
    spoilt = probabilities.clone()
    spoilt[who] = lie
    for joined in (Median(), Trimmed()):
        found = joined.join(spoilt, weights)
        assert bool((found <= others.max(0).values + 1e-9).all())
        assert bool((found >= others.min(0).values - 1e-9).all())


def test_a_specialist_alone_knows_its_class_and_a_claim_buys_no_majority():
    counts = [[0, 50], *[[40, 0]] * 4]
    weights = ensemble_weights("class", [50, 40, 40, 40, 40], counts)
    sure, other = torch.tensor([[0.0, 6.0]]), torch.tensor([[6.0, 0.0]])
    found = ensemble_probabilities([sure, *[other] * 4], weights, robust=Median())
    assert found[0, 1] == pytest.approx(
        0.5, abs=1e-3
    )  # each side is sure of its own class, and nobody else has seen it
    hostile = ensemble_weights("class", [1000, 40, 40, 40, 40], [[500, 500], *[[20, 20]] * 4])
    answers = {
        name: float(ensemble_probabilities([sure, *[other] * 4], hostile, robust=joined)[0, 1])
        for name, joined in JOINED.items()
    }
    assert answers["mean"] > 0.8
    assert answers["median"] < 0.01
    assert float(ensemble_probabilities([sure, *[other] * 4], hostile, robust=Median(most=1.0))[0, 1]) > 0.99


def test_teachers_of_whom_each_says_another_class_are_averaged():
    logits = [1000.0 * each[None] for each in torch.eye(3)]
    found = ensemble_probabilities(logits, torch.full((3, 1), 1 / 3), robust=Median())
    torch.testing.assert_close(found, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("by_certainty", [False, True])
@pytest.mark.parametrize("kind", JOINED)
def test_answers_are_those_of_all_logits_joined(kind, by_certainty):
    teachers, views = [small_vit(seed) for seed in range(4)], [torch.rand(n, 3, 16, 16) for n in (2, 3)]
    weights = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    weights, how = weights / weights.sum(0), {"by_certainty": by_certainty, "robust": JOINED[kind]}
    with torch.no_grad():
        for view, found in zip(views, ensemble_answers(teachers, views, weights, 2.0, **how), strict=True):
            logits = [teacher(view) for teacher in teachers]
            torch.testing.assert_close(found, ensemble_probabilities(logits, weights, 2.0, **how))
            own = weights[:, None]
            if by_certainty:
                sure = torch.stack([(p := each.softmax(-1)).pow(-p).prod(-1, keepdim=True) for each in logits])
                own = own / sure
            plain = JOINED[kind].join(torch.stack([(each / 2).softmax(-1) for each in logits]), own)
            torch.testing.assert_close(found, plain / plain.sum(-1, keepdim=True))


def test_factors_lower_a_teacher_and_may_leave_it_out():
    counts = [[3, 0, 0], [1, 5, 0], [0, 0, 0]]
    found = ensemble_weights("class", [3, 6, 1], counts, [1.0, 0.5, 0.0])
    torch.testing.assert_close(found, torch.tensor([[3 / 3.5, 0, 2 / 3], [0.5 / 3.5, 1, 1 / 3], [0, 0, 0]]))
    assert torch.equal(
        ensemble_weights("class", [3, 6, 1], counts, [1] * 3), ensemble_weights("class", [1] * 3, counts)
    )
    for factors in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0]):
        with pytest.raises(ValueError, match="factors: got"):
            ensemble_weights("uniform", [1, 1, 1], [None] * 3, factors)
