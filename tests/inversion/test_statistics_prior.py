"""The feature-statistics prior against a plain reading of its own docstring."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from smi_fed.inversion.losses import FeatureStatistics, statistics_prior
from tests.reference import plain_statistics


@st.composite
def problems(draw):
    """Tokens of a batch, where they stand, and statistics to compare with; float64."""
    n, prefix = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    images, layers, features = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kept = draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    positions = torch.stack([torch.randperm(n, generator=generator)[:kept] for _ in range(images)])
    if draw(st.booleans()):  # as the loop has them; a mirrored view is in another order
        positions = positions.sort(1).values
    tokens = [noise(images, prefix + kept, features) for _ in range(layers)]
    means = tuple(noise(prefix + n, features) for _ in range(layers))
    stds = tuple(noise(prefix + n, features).abs() + 0.1 for _ in range(layers))
    return tokens, positions, SimpleNamespace(prefix_tokens=prefix), FeatureStatistics(means, stds, 9)


def by_loops(layers, positions, teacher, known):
    lists = [[each.tolist() for each in group] for group in (layers, known.mean, known.std)]
    return plain_statistics.statistics_prior(lists[0], positions.tolist(), teacher.prefix_tokens, *lists[1:])


@settings(deadline=None)
@given(problems())
def test_the_prior_is_what_its_docstring_says(problem):
    layers, positions, teacher, known = problem
    expected = by_loops(layers, positions, teacher, known)
    assert float(statistics_prior(layers, positions, teacher, known)) == pytest.approx(expected, rel=1e-9)
    rounded = [layer.float() for layer in layers]
    found = statistics_prior(rounded, positions, teacher, known.to(rounded[0]))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-4)


@settings(deadline=None)
@given(problems(), st.integers(0, 99))
def test_its_gradient_is_the_slope_of_the_loops(problem, seed):
    layers, positions, teacher, known = problem
    generator = torch.Generator().manual_seed(seed)
    along = [torch.randn(layer.shape, generator=generator, dtype=torch.float64) for layer in layers]
    leaves = [layer.clone().requires_grad_() for layer in layers]
    gradients = torch.autograd.grad(statistics_prior(leaves, positions, teacher, known), leaves)
    slope = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, along, strict=True))
    ahead, behind = (
        by_loops([layer + step * way for layer, way in zip(layers, along, strict=True)], positions, teacher, known)
        for step in (1e-6, -1e-6)
    )
    assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-3, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_gradcheck(problem):
    layers, positions, teacher, known = problem
    leaves = [layer.requires_grad_() for layer in layers]
    assert gradcheck(lambda *each: statistics_prior(list(each), positions, teacher, known), leaves, atol=1e-4)


def test_a_value_by_hand():
    """Two images share place 1, of the others each has one alone: 0 and 2."""
    layer = torch.tensor([[[1.0], [3.0]], [[5.0], [2.0]]], dtype=torch.float64)
    positions = torch.tensor([[0, 1], [1, 2]])
    mean, std = torch.zeros(3, 1, dtype=torch.float64), torch.full((3, 1), 2.0, dtype=torch.float64)
    known = FeatureStatistics((mean,), (std,), 9)
    # Place 0: 1; place 1, of two tokens: mean 4, deviation 1, so 16 + 1 each; place 2: 4. A quarter of it, by 2^2.
    expected = (1 + 17 + 17 + 4) / 4 / 4
    assert float(statistics_prior([layer], positions, SimpleNamespace(prefix_tokens=0), known)) == expected
    assert by_loops([layer], positions, SimpleNamespace(prefix_tokens=0), known) == expected
