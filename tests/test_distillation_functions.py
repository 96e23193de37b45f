"""The pure functions behind `distill`: ensemble, loss, mixup."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from smi_fed.distillation import (
    BY_CLASS,
    ENSEMBLES,
    certainty,
    distillation_loss,
    ensemble_probabilities,
    ensemble_weights,
    mix,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "examples", "counts", "correct"),
    [
        ("uniform", [10, 30], [None, None], [[0.5], [0.5]]),
        ("examples", [10, 30], [None, None], [[0.25], [0.75]]),
        ("examples", [0, 0], [None, None], [[0.5], [0.5]]),
        ("class", [1, 1], [[3, 0], [1, 5]], [[0.75, 0.0], [0.25, 1.0]]),
        ("class", [9, 9, 9], [[0, 2], [0, 2], [0, 0]], [[1 / 3, 0.5], [1 / 3, 0.5], [1 / 3, 0.0]]),
        ("class", [1], [(0, 4)], [[1.0, 1.0]]),
        ("certainty", [10, 30], [None, None], [[0.5], [0.5]]),
        ("class_certainty", [1, 1], [[3, 0], [1, 5]], [[0.75, 0.0], [0.25, 1.0]]),
    ],
)
def test_ensemble_weights_by_hand(kind, examples, counts, correct):
    weights = ensemble_weights(kind, examples, counts)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(correct))


def test_certainty_by_hand():
    """Between two classes evenly: 1/2; of one alone: 1; a class that the teacher does not know costs nothing."""
    logits = torch.tensor([[0.0, 0.0, -float("inf")], [50.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(certainty(logits), torch.tensor([[1 / 2], [1.0], [1 / 3]]))


def test_a_sure_teacher_is_heard_more_where_it_is_sure():
    """Against probabilities mixed by hand, at another temperature than that of the certainty."""
    first = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, 0.2]])
    second = torch.tensor([[0.0, 0.2, 0.1], [0.0, 4.0, 1.0]])
    weights = torch.tensor([[0.5, 0.9, 0.1], [0.5, 0.1, 0.9]])
    expected = torch.zeros(2, 3)
    for logits, weight in zip((first, second), weights, strict=True):
        for image in range(2):
            plain = [float(p) for p in logits[image].softmax(-1)]
            sure = math.exp(sum(p * math.log(p) for p in plain))
            expected[image] += sure * weight * (logits[image] / 2).softmax(-1)
    expected /= expected.sum(1, keepdim=True)
    found = ensemble_probabilities([first, second], weights, 2.0, by_certainty=True)
    torch.testing.assert_close(found, expected)


@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 10**6), min_size=n, max_size=n), min_size=1))
)
def test_every_class_shares_out_one_voice(counts):
    for kind in ENSEMBLES:
        weights = ensemble_weights(kind, [sum(each) for each in counts], counts)
        assert weights.shape == (len(counts), len(counts[0]) if kind in BY_CLASS else 1)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "examples", "counts", "says"),
    [
        (
            "median",
            [1, 1],
            [None, None],
            "ensemble: got 'median', allowed: certainty | class | class_certainty | examples | uniform",
        ),
        ("class", [1, 1], [[1], None], "got 'class' but not every client sent label counts, allowed: certainty | exam"),
        ("class", [1, 1], [[1], [-1]], "got negative counts, allowed: counts >= 0"),
        ("examples", [1, -1], [None, None], "got negative counts, allowed: counts >= 0"),
    ],
)
def test_ensemble_weights_that_cannot_be(kind, examples, counts, says):
    with pytest.raises(ValueError, match="ensemble: got ") as error:
        ensemble_weights(kind, examples, counts)
    assert says in str(error.value)


def test_ensemble_probabilities_by_hand():
    ln = torch.tensor([1.0, 2.0, 4.0, 9.0]).log()
    logits = [torch.stack([ln[0], ln[0]])[None], torch.stack([ln[0], ln[3]])[None]]  # (1/2, 1/2) and (1/10, 9/10)
    even = torch.tensor([[0.5], [0.5]])
    torch.testing.assert_close(ensemble_probabilities(logits, even), torch.tensor([[0.3, 0.7]]))
    softer = ensemble_probabilities(logits, even, temperature=2.0)  # (1/2, 1/2) and (1/4, 3/4)
    torch.testing.assert_close(softer, torch.tensor([[0.375, 0.625]]))
    by_class = torch.tensor([[1.0, 0.5], [0.0, 0.5]])  # (0.5, 0.25 + 0.45), normalised
    torch.testing.assert_close(ensemble_probabilities(logits, by_class), torch.tensor([[0.5 / 1.2, 0.7 / 1.2]]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1.0, 30.0, 1000.0]), st.integers(0, 99))
def test_ensemble_probabilities_are_a_distribution(teachers, classes, scale, seed):
    generator = seeded(seed)
    logits = list(scale * torch.randn(teachers, 3, classes, generator=generator))
    counts = torch.randint(0, 3, (teachers, classes), generator=generator).tolist()
    mixed = ensemble_probabilities(logits, ensemble_weights("class", [1] * teachers, counts))
    assert bool((mixed >= 0).all())
    torch.testing.assert_close(mixed.sum(1), torch.ones(3))


@pytest.mark.parametrize("gap", [80.0, 200.0, 1e4])
def test_teachers_who_are_sure_of_what_they_have_not_seen(gap):
    logits = [torch.tensor([[gap, 0.0]]), torch.tensor([[0.0, gap]])]
    mixed = ensemble_probabilities(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.5]]))


def test_the_loss_by_hand():
    logits, correct = torch.tensor([[0.0, 2.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    student = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).exp()
    student = student / student.sum(1, keepdim=True)
    first = 0.5 * (0.5 / student[0, 0]).log() + 0.5 * (0.5 / student[0, 1]).log()
    second = -student[1, 0].log()
    torch.testing.assert_close(distillation_loss(logits, correct, 2.0), 4 * (first + second) / 2)
    assert float(distillation_loss(correct[:1].log() * 3, correct[:1], 3.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_of_the_loss(temperature):
    generator = seeded()
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    correct = torch.randn(3, 4, dtype=torch.float64, generator=generator).softmax(1)
    assert gradcheck(lambda x: distillation_loss(x, correct, temperature), logits)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([0.2, 0.5, 1, 1.0, 3.0]), st.integers(0, 99))
def test_mixed_images_keep_the_larger_share(count, alpha, seed):
    own = torch.eye(count).view(count, count, 1, 1)  # channel i tells the share of image i
    mixed = mix(own, alpha, seeded(seed))[:, :, 0, 0]
    torch.testing.assert_close(mixed.sum(1), torch.ones(count))
    assert bool((mixed.diagonal() >= 0.5 - 1e-6).all())
    lent = mixed - mixed.diagonal().diag() > 0
    assert bool((lent.sum(0) <= 1).all())  # a permutation: everybody takes from one and gives to one
    assert bool((lent.sum(1) <= 1).all())


@pytest.mark.parametrize(("alpha", "mean"), [(0.2, 0.91), (1.0, 0.75), (8.0, 0.60)])
def test_alpha_says_how_much_is_mixed(alpha, mean):
    own = torch.eye(1000).view(1000, 1000, 1, 1)
    shares = mix(own, alpha, seeded())[:, :, 0, 0].diagonal()
    assert float(shares.mean()) == pytest.approx(mean, abs=0.02)


def test_alpha_0_mixes_nothing_and_draws_nothing():
    images, generator = torch.rand(3, 1, 2, 2), seeded()
    assert mix(images, 0.0, generator) is images
    assert torch.equal(generator.get_state(), seeded().get_state())
