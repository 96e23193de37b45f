import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, field, fields, replace
from typing import Annotated, Any, Literal

import pytest

from smi_fed.checks import (
    Allowed,
    Betas,
    Count,
    Device,
    Flag,
    Fraction,
    Natural,
    NonNegative,
    Number,
    Positive,
    SettingError,
    Share,
    Text,
    checked,
    one_of,
    read,
    require,
)


@checked
class Inner:
    """Settings of a part."""

    steps: Count = 3
    rate: Positive = 0.5
    kind: Literal["b", "a"] = "a"

    def __post_init__(self) -> None:
        require(self.steps != 7, "steps", self.steps, "anything but 7")


@checked
class Extended(Inner):
    """Settings that extend others."""

    steps: Count = 5
    sizes: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.sizes) < 3, "sizes", self.sizes, "at most 2")


@checked
class Outer:
    """Settings of everything."""

    inner: Inner
    named: Mapping[str, Inner] = field(default_factory=dict)
    free: Mapping[str, Any] | None = None


def refused(make, *args, **kwargs):
    with pytest.raises(SettingError) as error:
        make(*args, **kwargs)
    return error.value


INF, NAN = float("inf"), float("nan")
TYPES: list[tuple[Any, list[Any], list[Any], str]] = [
    (Count, [1, 2**53 - 1], [0, -1, True, 1.0, "1", None, NAN], "an int >= 1"),
    (Natural, [0, 5], [-1, False, 0.0, "0", [0]], "an int >= 0"),
    (Flag, [True, False], [0, 1, "true", "yes", None], "true | false"),
    (Text, ["", "ü'\"\\"], [1, b"a", None, ["a"], True], "a text"),
    (Number, [-1.5, 0.0], [NAN, INF, -INF, True, "1", None, 1j], "a finite number"),
    (Positive, [1e-9, 3.0], [0, 0.0, -1, NAN, INF, "1", True], "a number > 0"),
    (NonNegative, [0.0, 3.0], [-1e-9, NAN, INF, "1", False], "a number >= 0"),
    (Share, [0.5], [0.0, 1.0, 0, 1, NAN, "0.5"], "a number inside (0, 1)"),
    (Fraction, [0.0, 0.99], [1.0, -0.1, NAN, False], "a number in [0, 1)"),
    (Betas, [(0.0, 0.9)], [(0.9,), (0.9, 1.0), (0.1, 0.2, 0.3), 0.9, "ab", (True, 0.1)], "two numbers in [0, 1)"),
    (
        Device,
        ["auto", "cpu", "cuda", "cuda:3"],
        ["", "tpu", "cuda:", "cuda:x", " cpu", 0, None, "cuda:٣"],
        "auto | cpu",
    ),
    (Literal["b", "a"], ["a"], ["c", "", 1, None, ["a"], {}], "a | b"),
    (Annotated[Text, one_of({"x": 1, "a": 2})], ["x"], ["c", "A"], "a | x"),
    (Annotated[Count | None, Allowed("an int or null")], [None, 4], [0, "4", 1.0], "an int or null"),
]


@pytest.mark.parametrize(("kind", "good", "bad", "words"), TYPES, ids=[words for *_, words in TYPES])
def test_a_type_lets_in_what_its_words_say(kind, good, bad, words):
    Holder = checked(type("Holder", (), {"__annotations__": {"x": kind}}))
    for value in good:
        found = Holder(x=value).x
        assert (found, type(found)) == (value, type(value))
    for value in bad:
        error = refused(Holder, x=value)
        assert (error.key, error.got) == ("x", value) or value != value  # noqa: PLR0124
        assert error.allowed.startswith(words)
        assert str(error) == f"x: got {value!r}, allowed: {error.allowed}"
        assert str(refused(read, Holder, {"x": value})) == str(error)


def test_whole_numbers_that_no_seed_or_record_holds_are_refused():
    assert refused(Inner, steps=2**53).key == "steps"


def test_only_lists_and_whole_numbers_are_converted():
    made = Extended(rate=2, sizes=[1, 2])
    assert made == Extended(rate=2.0, sizes=(1, 2))
    assert repr(made) == "Extended(steps=5, rate=2.0, kind='a', sizes=(1, 2))"


def test_all_faults_are_told_at_once_with_their_paths():
    values = {"inner": {"steps": 0, "rat": 1}, "named": {"x": {"kind": "c"}, "y": None}, "free": 3, "more": 1}
    assert str(refused(read, Outer, values)).split("; ") == [
        "inner.steps: got 0, allowed: an int >= 1",
        "inner.rat: got 1, allowed: a key of inner: rate",
        "named.x.kind: got 'c', allowed: a | b",
        "named.y: got None, allowed: a mapping",
        "free: got 3, allowed: a mapping",
        "more: got 1, allowed: a key of the configuration: free | named",
    ]
    error = refused(Inner, steps=0, kind=3)
    assert (error.key, error.got, error.allowed) == ("steps", 0, "an int >= 1")
    assert [each.key for each in error.more] == ["kind"]


def test_rules_over_several_fields_have_their_paths_too():
    error = refused(read, Outer, {"inner": {"steps": 7}, "named": {"x": {"steps": 7}}})
    assert str(error) == "; ".join(f"{key}.steps: got 7, allowed: anything but 7" for key in ("inner", "named.x"))
    assert refused(Extended, steps=7).key == "steps"
    assert refused(Extended, sizes=[1, 2, 3]).got == (1, 2, 3)


@pytest.mark.parametrize("values", [None, 3, [], "x", {}, {"inner": None}, {"inner": 3}, {"inner": []}, {1: 2}])
def test_what_is_no_group_is_refused_by_its_key(values):
    error = refused(read, Outer, values)
    assert error.key == ("inner" if isinstance(values, dict) else "Outer")


def test_arguments_are_named_however_they_come():
    assert refused(Inner, 0).key == "steps"
    assert refused(Inner, 1, -1).key == "rate"
    assert refused(Inner, 1, 1, "a", 5).got == 5
    assert refused(Inner, stepps=1).allowed == "a key of the configuration: steps | rate"
    assert str(refused(Outer)) == "inner: got None, allowed: a value, it has no default"


def test_a_checked_class_is_a_frozen_dataclass():
    made = Outer(Inner(2), {"x": Inner()})
    assert replace(made.inner, rate=1) == Inner(2, 1.0)
    assert refused(replace, made.inner, rate=0).key == "rate"
    assert asdict(made)["inner"] == {"steps": 2, "rate": 0.5, "kind": "a"}
    assert [each.name for each in fields(Extended)] == ["steps", "rate", "kind", "sizes"]
    assert pickle.loads(pickle.dumps(made)) == made
    assert read(Outer, asdict(made)) == made
    assert hash(Inner(2)) == hash(Inner(2))
    assert vars(made.inner) == asdict(made.inner)
    assert isinstance(Outer(Extended()).inner, Extended)
    with pytest.raises(FrozenInstanceError):
        made.inner.steps = 3


def test_an_error_keeps_its_parts():
    error = refused(Inner, steps=0, rate=0).under("a").under("b")
    assert str(error) == "b.a.steps: got 0, allowed: an int >= 1; b.a.rate: got 0, allowed: a number > 0"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, ValueError)
