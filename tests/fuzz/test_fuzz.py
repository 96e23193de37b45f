"""Doors under many hostile cases: a few here, all of them in the slow test, a million in benchmarks/results."""

import json
import socket
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smi_fed.strategies.records import BadReplyError
from tests.fuzz import campaign
from tests.fuzz.__main__ import RESULTS, doors
from tests.fuzz.door import MEBIBYTE, Case, Door

SLOW = ("objects", "shape", "extremes", "last head", "old reply", "report", "pictures", "student", "inversion", "run")
SEEDS, CASES = 25, 100
SLOW_CASES = 12_000


@given(seed=st.integers(0, 2**32))
@settings(max_examples=SEEDS, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_each_case_is_let_in_or_refused_as_its_door_promises(seed):
    chosen = [door for door in doors() if door.name not in SLOW]
    found = campaign.run(chosen, CASES, seed)
    assert sum(tally.cases for tally in found.values()) >= CASES
    assert [fault for tally in found.values() for fault in tally.faults] == []


@pytest.mark.slow
def test_every_door_takes_its_share_of_ten_thousand_cases(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(SLOW_CASES), "--output", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [fault for line in found["doors"] for fault in line["faults"]] == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert found["cases"] >= 10_000
    assert [line["door"] for line in found["doors"]] == [door.name for door in doors()]
    assert all(line["cases"] == line["accepted"] + line["refused"] > 0 for line in found["doors"])
    # A generator whose cases all end alike tries nothing; a text is never let in, or always.
    many = [line for line in found["doors"] if line["cases"] >= 100 and line["door"] not in ("error", "name")]
    assert [line["door"] for line in many if not (line["accepted"] and line["refused"])] == []
    assert len(many) > 8


def test_the_published_million_is_of_these_doors():
    found = json.loads(RESULTS.read_text())
    assert found["cases"] >= 1_000_000
    assert {line["door"] for line in found["doors"]} == {door.name for door in doors()}
    assert all(line["faults"] == [] for line in found["doors"])


def raises(error):
    def enter():
        raise error

    return enter


def takes_much():
    bytearray(40 * MEBIBYTE)


def asks_for_much():
    import numpy as np

    np.empty(2**33, np.uint8)


def reaches_out():
    with socket.socket() as own:
        own.settimeout(0.01)
        own.connect_ex(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("enter", "says"),
    [
        (raises(KeyError("x")), "KeyError"), (raises(MemoryError()), "MemoryError"),
        (takes_much, "bytes for a message"), (asks_for_much, "bytes for a message"), (reaches_out, "socket.connect"),
        (lambda: sum(range(10**7)), "seconds"),
    ],
)  # fmt: skip
def test_a_fault_is_seen(enter, says):
    door = Door("planted", "nothing", lambda _: Case(0, enter), 1, seconds=0.02 if says == "seconds" else 5.0)
    (fault,) = campaign.run([door], 1, seed=0)["planted"].faults
    assert says in fault.what


def test_a_refusal_is_no_fault_and_a_case_can_be_made_again():
    seen = []

    def make(rng):
        seen.append(rng.random())
        return Case(0, raises(BadReplyError("no 'x' of 7")))

    door = Door("planted", "nothing", make, 1)
    tally = campaign.run([door], 3, seed=4)["planted"]
    assert (tally.cases, tally.accepted, tally.refused, tally.faults) == (3, 0, {"no _ of _": 3}, [])
    campaign.run([door], 1, seed=4, first=2)
    assert seen[3] == seen[2] != seen[1]
