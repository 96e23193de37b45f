"""Seconds to a target, from lines as the study keeps them; and a grid that holds replies back."""

import time

import pytest
from flwr.app import Message, RecordDict

from simulations.stragglers import METHODS, SlowGrid, figure, seconds_to, table


def line(method, seed, seconds, accuracy):
    return {"method": method, "seed": seed, "pace": 1.0, "seconds": seconds, "accuracy": accuracy}


ALL, QUORUM, WITHOUT = METHODS
LINES = [
    line(ALL, 0, [100.0, 200.0], [0.6, 0.9]),
    line(ALL, 1, [110.0, 230.0], [0.7, 0.84]),
    line(QUORUM, 0, [30.0, 60.0, 90.0], [0.5, 0.86, 0.84]),
    line(QUORUM, 1, [30.0, 70.0, 95.0], [0.5, 0.7, 0.85]),
]


def test_the_first_time_counts_and_never_is_said():
    assert [seconds_to(each) for each in LINES] == [200.0, None, 60.0, 95.0]
    assert seconds_to(LINES[1], 0.7) == 110.0
    (found,) = table(LINES)
    assert found.title.endswith("seeds [0, 1]")
    assert found.rows[1:] == [
        [ALL, "1 of 2", "200, never", "60.0, 70.0", "105", "90.0, 84.0", "215"],
        [QUORUM, "78", "60, 95", "50.0, 50.0", "30", "84.0, 85.0", "92"],
    ]


def test_the_picture_can_be_drawn(tmp_path):
    figure(LINES).savefig(tmp_path / "stragglers.png")
    assert (tmp_path / "stragglers.png").read_bytes().startswith(b"\x89PNG")


def test_a_reply_is_there_when_its_seconds_are_over():
    grid = SlowGrid(lambda message, _: Message(RecordDict(), reply_to=message), {1: {}, 2: {}}, pace={1: 0.0, 2: 0.3})
    ids = grid.push_messages([Message(RecordDict(), node, "train") for node in (1, 2)])
    began = time.monotonic()
    found = {}
    while len(found) < 2 and time.monotonic() < began + 10:
        for reply in grid.pull_messages(ids):
            found[ids.index(reply.metadata.reply_to_message_id)] = time.monotonic() - began
    assert found[0] < 0.3 <= found[1] == pytest.approx(0.3, abs=0.3)
