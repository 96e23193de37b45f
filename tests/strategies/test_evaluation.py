"""What clients measured, put together, by hand; and what a client may not say."""

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.strategies.evaluation import NOTHING, Counts, Evaluated, Measured, in_words, named, shares, summary
from smi_fed.strategies.evaluation_records import pack_evaluation, read_evaluation
from smi_fed.strategies.records import BadReplyError

CLASSES = ("cat", "cow", "dog")
# 10 images of two classes; 30 of other two, of which one is the same; none; and one that does not tell its classes
MARY = Measured("Mary", Counts(10, 5, 9), (Counts(4, 1, 4), Counts(6, 4, 5), Counts(0, 0, 0)))
NORTH = Measured("North", Counts(30, 24, None), (Counts(0, 0), Counts(10, 8), Counts(20, 16)))
EMPTY = Measured("Empty", Counts(0, 0), (Counts(0, 0),) * 3)
SILENT = Measured("Silent", Counts(20, 18, 10))
FOUND = [
    Evaluated(1, "Mary", MARY), Evaluated(2, "North", NORTH), Evaluated(3, "Empty", EMPTY),
    Evaluated(4, "Silent", SILENT), Evaluated(5, "South", reason="the disk is full"),
]  # fmt: skip


def test_the_mean_is_weighted_by_images_and_the_worst_client_is_named():
    found = summary(FOUND, CLASSES)
    assert found["mean"] == {
        "images": 60, "student_right": 47, "student_accuracy": 47 / 60, "own_right": 19, "own_accuracy": 19 / 30,
    }  # fmt: skip
    weighted = (10 * 0.5 + 30 * 0.8 + 20 * 0.9) / 60
    assert found["mean"]["student_accuracy"] == pytest.approx(weighted)
    assert (found["worst"]["name"], found["worst"]["student_accuracy"]) == ("Mary", 0.5)
    assert (found["worst"]["own_accuracy"], found["worst"]["images"]) == (0.9, 10)


def test_each_client_has_its_line_and_its_own_classes():
    lines = {line["name"]: line for line in summary(FOUND, CLASSES)["clients"]}
    assert {name: (each["images"], each["student_accuracy"], each["own_accuracy"]) for name, each in lines.items()} == {
        "Mary": (10, 0.5, 0.9), "North": (30, 0.8, None), "Empty": (0, None, None), "Silent": (20, 0.9, 0.5),
        "South": (0, None, None),
    }  # fmt: skip
    assert [(each["class"], each["student_accuracy"], each["own_accuracy"]) for each in lines["Mary"]["per_class"]] == [
        ("cat", 0.25, 1.0), ("cow", 4 / 6, 5 / 6),
    ]  # fmt: skip
    assert [each["class"] for each in lines["North"]["per_class"]] == ["cow", "dog"]
    assert (lines["Silent"]["per_class"], lines["South"]["per_class"]) == ([], [])
    reasons = {name: each["reason"] for name, each in lines.items() if each["reason"]}
    assert reasons == {"Empty": NOTHING, "South": "the disk is full"}


def test_classes_are_summed_over_those_that_tell_them():
    cat, cow, dog = summary(FOUND, CLASSES)["per_class"]
    assert cat == {"class": "cat", "images": 4, "student_right": 1, "student_accuracy": 0.25, "own_right": 4,
                   "own_accuracy": 1.0}  # fmt: skip
    assert (cow["images"], cow["student_right"], cow["own_right"], cow["own_accuracy"]) == (16, 12, 5, 5 / 6)
    assert (dog["images"], dog["student_accuracy"], dog["own_accuracy"]) == (20, 0.8, None)
    lacking = summary(FOUND[:1], CLASSES)["per_class"][2]
    assert (lacking["images"], lacking["student_accuracy"]) == (0, None)


def test_where_nobody_measured_there_is_no_mean():
    found = summary([FOUND[2], FOUND[4]], CLASSES)
    assert (found["mean"], found["worst"], found["per_class"]) == (None, None, [])
    assert in_words(found) == "no client measured anything; without Empty, South"
    assert summary([], CLASSES)["clients"] == []
    assert "student 78.3 % of 60 images" in in_words(summary(FOUND, CLASSES))
    assert "(their own models 63.3 %); worst at Mary, 50.0 %; without Empty, South" in in_words(summary(FOUND, CLASSES))


def test_no_two_names_are_equal_and_nobody_takes_a_known_one():
    found = [Evaluated(9, "Mary"), Evaluated(7, "Mary"), Evaluated(1), Evaluated(2, "North"), Evaluated(3, "North")]
    names = {each.node: each.name for each in named(found, {9: "Mary"})}
    assert names == {9: "Mary", 7: "Mary (node 7)", 1: "node 1", 2: "North", 3: "North (node 3)"}
    assert [each.name for each in named(found, {})] == sorted(each.name for each in named(found, {}))


def over_the_wire(content):
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize("measured", [MARY, NORTH, EMPTY, SILENT], ids=lambda each: each.name)
def test_what_is_packed_is_read(measured):
    assert read_evaluation(over_the_wire(pack_evaluation(measured)), 3, 100) == measured


GOOD = {"num-examples": 5, "student-right": 3, "own-right": 2}
LISTS = {"class-num-examples": [2, 0, 3], "class-student-right": [1, 0, 2], "class-own-right": [1, 0, 1]}


def reply(metrics, **who):
    return RecordDict({
        "metrics": MetricRecord(metrics), "smi-fed.model": ConfigRecord({"schema": 1, "name": "St Mary", **who}),
    })  # fmt: skip


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "no numbers 'metrics'"),
        (RecordDict({"metrics": ConfigRecord({}), "smi-fed.model": ConfigRecord({})}), "no numbers 'metrics'"),
        (reply(GOOD, schema=2), "schema version is 2"),
        (reply(without(GOOD, "num-examples")), "num-examples is None"),
        (reply(GOOD | {"num-examples": 5.0}), "num-examples is 5.0, expected an int from 0 to 100"),
        (reply(GOOD | {"num-examples": 101}), "num-examples is 101, expected an int from 0 to 100"),
        (reply(GOOD | {"num-examples": -1}), "num-examples is -1"),
        (reply(GOOD | {"num-examples": [5]}), r"num-examples is \[5\]"),
        (reply(without(GOOD, "student-right")), "student-right is None, expected an int from 0 to 5"),
        (reply(GOOD | {"student-right": 6}), "student-right is 6, expected an int from 0 to 5"),
        (reply(GOOD | {"student-right": float("nan")}), "student-right is nan"),
        (reply(GOOD | {"own-right": -2}), "own-right is -2"),
        (reply(GOOD | {"own-right": 1.5}), "own-right is 1.5"),
        (reply(GOOD | LISTS | {"class-own-right": [1, 1]}), "class-own-right is 2 numbers, expected one for each of 3"),
        (reply(GOOD | LISTS | {"class-own-right": 1}), "class-own-right is 1, expected one for each of 3"),
        (reply(GOOD | LISTS | {"class-own-right": [2, 1, -1]}), "own-right is 1, expected an int from 0 to 0"),
        (reply(GOOD | LISTS | {"class-num-examples": [2, 1, 3]}), "counts by class add up to .*images=6"),
        (reply(GOOD | without(LISTS, "class-own-right")), "counts by class add up to .*own=None.* are .*own=2"),
        (reply(GOOD | without(LISTS, "class-num-examples")), "num-examples is None"),
    ],
)
def test_what_cannot_be_true_is_refused_by_its_key(content, reason):
    with pytest.raises(BadReplyError, match=reason):
        read_evaluation(content, 3, 100)


def test_names_are_cleaned():
    assert read_evaluation(reply(GOOD, name="St [red]Mary\n"), 3, 100).name == "St redMary"
    assert read_evaluation(reply(GOOD | LISTS), 3, 100).classes == (Counts(2, 1, 1), Counts(0, 0, 0), Counts(3, 2, 1))


INT = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 9)
NUMBER = INT | st.floats() | st.lists(INT, max_size=4) | st.lists(st.floats(), max_size=4)
KEYS = st.sampled_from([*GOOD, *LISTS, "other"])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(KEYS, NUMBER, max_size=7), st.text(max_size=80), st.sampled_from([{}, GOOD, GOOD | LISTS]))
def test_whatever_a_client_says_it_is_refused_or_can_be_true(changes, name, base):
    try:
        found = read_evaluation(reply({**base, **changes}, name=name), 3, 100)
    except BadReplyError:
        return
    for counts in (found.total, *(found.classes or ())):
        assert 0 <= counts.student <= counts.images <= 100
        assert counts.own is None or 0 <= counts.own <= counts.images
    rows = summary([Evaluated(1, found.name, found)], CLASSES)
    accuracies = [shares([found.total])[key] for key in ("student_accuracy", "own_accuracy")]
    accuracies += [each["student_accuracy"] for each in rows["per_class"]]
    assert all(each is None or 0 <= each <= 1 for each in accuracies)
    assert found.classes is None or sum(each.images for each in found.classes) == found.total.images
