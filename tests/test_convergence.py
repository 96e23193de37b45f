import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.convergence import reaches, speedup

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.95], 30),
        ([0.9, 0.9, 0.9, 0.9], 10),
        ([0.1, 0.2, 0.3, 0.9], 40),
        ([0.1, 0.2, 0.3, 0.4], None),
        ([0.9, 0.7, 0.9, 0.9], 30),
        ([0.9, 0.9, 0.9, 0.7], None),
        ([0.9, 0.7, 0.9, 0.7], None),
        ([0.1, 0.8, 0.8, 0.8], 20),
        ([0.8, 0.7999, 0.8, 0.8], 30),
        ([0.9, NAN, 0.9, 0.9], 30),
        ([0.9, 0.9, 0.9, NAN], None),
        ([NAN] * 4, None),
        ([math.inf] * 4, 10),
    ],
    ids=[
        "converges", "at once", "at the end", "never", "relapses once", "relapses at the end", "swings", "touches it",
        "just misses it", "nan on the way", "nan at the end", "only nan", "infinite",
    ],
)  # fmt: skip
def test_when_a_curve_has_converged(values, expected):
    assert reaches(values, [10, 20, 30, 40], 0.8) == expected


def test_an_empty_curve_reaches_nothing():
    assert reaches([], [], 0.0) is None


def test_costs_need_not_start_anywhere_nor_be_even():
    assert reaches([0.1, 0.9], [-3.5, 0.25], 0.9) == 0.25
    assert reaches((0.9,), (0,), 0.9) == 0


@pytest.mark.parametrize(
    ("values", "costs", "says"),
    [
        ([1.0], [], "got 1 values and 0 costs, need one cost per value"),
        ([1.0], [1, 2], "got 1 values and 2 costs"),
        ([1.0, 1.0], [1, 1], r"costs have to rise, got \[1, 1\]"),
        ([1.0, 1.0], [2, 1], r"costs have to rise, got \[2, 1\]"),
        ([1.0, 1.0, 1.0], (1, 3, 2), r"costs have to rise, got \[1, 3, 2\]"),
    ],
)
def test_curves_that_cannot_be(values, costs, says):
    with pytest.raises(ValueError, match=says):
        reaches(values, costs, 0.5)


def slow(values, costs, target):
    for start in range(len(values)):
        if all(value >= target for value in values[start:]):
            return costs[start]
    return None


values = st.lists(st.sampled_from([0.0, 0.5, 0.8, 0.8000001, 1.0, NAN]) | st.floats(0, 1), max_size=12)


@given(values, st.sampled_from([0.0, 0.5, 0.8, 1.0, 1.5]), st.data())
def test_it_is_the_first_value_from_which_none_falls_below(values, target, data):
    steps = data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)))
    costs = [sum(steps[: i + 1]) for i in range(len(steps))]
    assert reaches(values, costs, target) == slow(values, costs, target)


@given(values, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_target_is_not_reached_earlier(values, one, other):
    costs = range(len(values))
    low, high = (reaches(values, costs, target) for target in sorted((one, other)))
    assert high is None or (low is not None and low <= high)


@pytest.mark.parametrize(
    ("cost", "reference", "expected"),
    [(10, 40, 4.0), (40, 10, 0.25), (10.0, 10, 1.0), (None, 40, None), (10, None, None), (None, None, None),
     (0, 40, None), (10, 0, 0.0)],
)  # fmt: skip
def test_speedup(cost, reference, expected):
    assert speedup(cost, reference) == expected
