import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.inversion import StopSchedule

ratios = st.floats(0.01, 0.99)


@st.composite
def schedules(draw):
    iterations = sorted(draw(st.sets(st.integers(1, 5000), max_size=6)))
    return StopSchedule(tuple((i, draw(ratios)) for i in iterations))


def test_the_papers_schedule_on_a_224_px_vit():
    schedule = StopSchedule.parse("50:0.3,100:0.3,200:0.3,300:0.3")
    assert schedule.kept_counts(196) == [(0, 196), (50, 137), (100, 95), (200, 66), (300, 46)]


def test_an_empty_text_is_dense():
    assert StopSchedule.parse("") == StopSchedule()
    assert StopSchedule.parse("").kept_counts(64) == [(0, 64)]


@given(schedules(), st.integers(1, 1024))
def test_counts_fall_but_never_below_one(schedule, patches):
    counts = schedule.kept_counts(patches)
    assert counts[0] == (0, patches)
    remaining = patches
    for (_, ratio), (_, kept) in zip(schedule.stops, counts[1:], strict=True):
        assert kept == max(1, math.floor(remaining * (1 - ratio) + 1e-9))
        remaining = kept


def test_a_schedule_in_proportion():
    assert str(StopSchedule.parse("50:0.3,100:0.4").scaled(0.5)) == "25:0.3,50:0.4"
    assert str(StopSchedule.parse("50:0.3,100:0.3,200:0.3,300:0.3").scaled(0.02)) == "1:0.3,2:0.3,4:0.3,6:0.3"
    assert str(StopSchedule.parse("1:0.3,2:0.3").scaled(0.01)) == "1:0.3,2:0.3"


@given(schedules(), st.floats(0.001, 10))
def test_scaling_keeps_every_ratio(schedule, share):
    assert [ratio for _, ratio in schedule.scaled(share).stops] == [ratio for _, ratio in schedule.stops]


@given(schedules())
def test_text_and_schedule_are_the_same(schedule):
    assert StopSchedule.parse(str(schedule)) == schedule


def test_rounding_does_not_lose_a_patch():
    assert StopSchedule(((1, 0.1),)).kept_counts(10)[-1] == (1, 9)  # 10 * 0.9 is 9.000000000000000x either way
    assert StopSchedule(((1, 0.9),)).kept_counts(20)[-1] == (1, 2)  # 20 * (1 - 0.9) is 1.9999999999999996
    assert StopSchedule(((1, 0.7),)).kept_counts(10)[-1] == (1, 3)  # 10 * (1 - 0.7) is 3.0000000000000004 or 2.999..


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("50:1.0", "inside"), ("50:0", "inside"), ("50:-0.1", "inside"), ("50:nan", "inside"),
        ("50:0.3,50:0.3", "increasing"), ("50:0.3,40:0.3", "increasing"), ("-1:0.3", "iterations >= 0"),
        ("50", "ITERATION:RATIO"), ("a:0.3", "ITERATION:RATIO"), ("50:0.3,", "ITERATION:RATIO"), ("1.5:0.3", "ITER"),
    ],
)  # fmt: skip
def test_impossible_schedules_are_refused(text, says):
    with pytest.raises(ValueError, match=says) as error:
        StopSchedule.parse(text)
    assert "schedule: got" in str(error.value)
