"""Who is told of what happens in a run, and the log of events."""

import json
import logging

import pytest

from simulations.local_grid import InProcessGrid
from smi_fed.events import Event, Events
from smi_fed.strategies import WatchingGrid
from smi_fed.watchers import JsonLines, scalars
from tests.strategies.test_data_free import NODES, failing_client, start, strategy


def test_all_are_told_of_start_and_failure_and_one_who_fails_is_told_no_more(caplog):
    told, failures = [], []

    def broken(event):
        failures.append(event.name)
        raise OSError("the disk is full")

    def fail(events):
        with events:
            events.round = 2
            events.tell("reply", "refused", "client 1", reason="late")
            raise RuntimeError("too few")

    with caplog.at_level(logging.WARNING, "smi_fed"), pytest.raises(RuntimeError, match="too few"):
        fail(Events("night", [broken, told.append], {"seed": 3, "name": "a key like an argument"}))
    assert failures == ["started"]
    assert "the disk is full" in caplog.text
    assert [(e.run, e.round, e.stage, e.name, e.node, dict(e.values)) for e in told] == [
        ("night", 0, "run", "started", "", {"seed": 3, "name": "a key like an argument"}),
        ("night", 2, "reply", "refused", "client 1", {"reason": "late"}),
        ("night", 2, "run", "failed", "", {"reason": "RuntimeError: too few"}),
    ]
    assert told[0].time <= told[1].time <= told[2].time
    with Events("day", [told.append]):
        pass
    assert told[-1].name == "ended"


def test_a_log_goes_on_after_what_was_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    one, two, three = (
        Event(1.5, "run", round_, "round", "started", values={"loss": float("nan"), "reason": "\ud800"})
        for round_ in (1, 2, 3)
    )
    first = JsonLines(path)
    first(one)
    first(two)
    path.write_bytes(path.read_bytes()[:-9])  # a crash in the middle of the second line
    JsonLines(path)(three)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 3]
    assert lines[0] == {
        "time": 1.5, "run": "run", "round": 1, "stage": "round", "name": "started", "node": "",
        "values": {"loss": "nan", "reason": "\ud800"},
    }  # fmt: skip
    unused = JsonLines(path, append=False)
    assert len(path.read_text().splitlines()) == 2  # nothing goes before there is something to write
    unused(two)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [2]


def test_numbers_have_a_name_and_a_place_that_grows_over_rounds():
    values = {"done": 3, "total": 10, "loss": 0.5, "patches": "3/9"}
    assert scalars(Event(0.0, "", 3, "distillation", "progress", values=values)) == (
        {"distillation/progress/loss": 0.5},
        23,
    )
    ended = Event(0.0, "", 3, "inversion", "ended", "St Mary", {"images": 4, "seconds": 1.5})
    assert scalars(ended) == ({"inversion/ended/images/St Mary": 4.0, "inversion/ended/seconds/St Mary": 1.5}, 3)


def test_a_strategy_in_somebodys_own_app_tells_what_it_does(tmp_path):
    told = []
    events = Events("mine", [told.append, JsonLines(tmp_path / "events.jsonl")])
    wrapped = strategy(events=events, min_teachers=1)
    start(wrapped, WatchingGrid(InProcessGrid(failing_client, NODES), interval=0.01))
    assert {(event.run, event.round) for event in told} == {("mine", 1)}
    replies = {(event.name, event.node) for event in told if event.stage == "reply"}
    assert replies == {
        ("arrived", "node 11"), ("admitted", "client 0"),  # the name that it was admitted by
        ("arrived", "node 22"), ("refused", "node 22"),  # calls itself client 1, which nobody believed
        ("refused", "node 33"),
    }  # fmt: skip
    reasons = {event.values["id"]: event.values["reason"] for event in told if event.name == "refused"}
    assert "not finite" in reasons["22"]
    assert "the disk is full" in reasons["33"]
    rest = [(event.stage, event.name, event.node) for event in told if event.stage != "reply"]
    inversion = [("inversion", name, "client 0") for name in ("started", *["progress"] * 3, "ended")]
    taught = [("distillation", name, "") for name in ("started", "progress", "progress", "ended")]
    assert rest == [("round", "started", ""), *inversion, *taught, ("aggregation", "ended", ""), ("round", "ended", "")]
    (progress,) = [event.values for event in told if event.values.get("done") == 2 and event.stage == "distillation"]
    assert progress["loss"] == pytest.approx(wrapped.rounds[0].distillation.losses[1])
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == len(told)
