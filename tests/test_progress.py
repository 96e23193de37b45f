import logging
import sys
from itertools import pairwise

import pytest
import torch

from smi_fed import progress
from smi_fed.inversion import InversionProgress
from smi_fed.progress import LOG_INTERVAL, Bar, show_inversion


class Read(torch.Tensor):
    """Counts how often its value is asked for."""

    count = 0

    def __float__(self):
        Read.count += 1
        return 0.125


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved, and no terminal."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(Read, "count", 0)
    return Clock


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="smi_fed")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "smi_fed"]


def test_lines_are_throttled_but_the_first_and_the_last_come(clock, lines):
    with Bar("work", 100) as bar:
        for done in range(1, 101):
            bar.at(done)
    assert len(lines()) == 2
    assert "1/100" in lines()[0]
    assert "100/100" in lines()[1]


def test_a_line_comes_every_few_seconds(clock, lines):
    with Bar("work", 100) as bar:
        for done in range(1, 101):
            bar.at(done)
            clock.now += LOG_INTERVAL / 10
    shown = [int(line.split("/100")[0].split()[-1]) for line in lines()]
    assert shown[0] == 1
    assert shown[-1] == 100
    assert 10 <= len(shown) <= 12
    assert all(9 <= later - earlier <= 11 for earlier, later in pairwise(shown[:-1]))


def test_slow_work_is_shown_every_time(clock, lines):
    with Bar("work", 4) as bar:
        for done in range(1, 5):
            clock.now += LOG_INTERVAL
            bar.at(done)
    assert len(lines()) == 4


def test_tensors_are_read_only_when_shown(clock, lines):
    loss = torch.zeros(()).as_subclass(Read)
    with Bar("work", 1000) as bar:
        for done in range(1, 1001):
            bar.at(done, loss=loss)
    assert Read.count == len(lines()) == 2


def test_a_line_says_what_how_far_and_how_it_goes(clock, lines):
    label = "inversion of client 3 (vit_tiny_patch16_224 with registers)"
    with Bar(label, 200, unit="step") as bar:
        clock.now += 10
        bar.at(50, patches="66/196", loss=torch.tensor(0.123456), rate=0.5, images=7)
    (line,) = lines()
    assert line.startswith(label)
    for part in ("25%", "50/200", "step", "patches 66/196", "loss 0.123", "rate 0.5", "images 7"):
        assert part in line
    assert "00:10<00:30" in line  # a quarter took 10 seconds


def test_an_inversion_is_shown(clock, lines):
    with Bar("inversion", 40) as bar:
        loss = torch.tensor(2.5)
        now = InversionProgress(40, 40, images=8, kept=66, patches=196, spent={}, loss=loss, seconds=1.0)
        show_inversion(bar, now)
    (line,) = lines()
    for part in ("40/40", "patches 66/196", "images 8", "loss 2.5"):
        assert part in line


def test_a_terminal_gets_one_live_bar_and_no_lines(clock, lines, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    loss = torch.zeros(()).as_subclass(Read)
    with Bar("work", 100) as bar:
        for done in range(1, 101):
            bar.at(done, loss=loss)
    assert lines() == []
    written = capsys.readouterr().err
    assert "work" in written
    assert "100/100" in written
    assert "loss 0.125" in written
    assert Read.count == 2
    assert bar.live.disable  # closed


def test_a_block_that_fails_is_not_swallowed(clock):
    with pytest.raises(RuntimeError, match="inside"), Bar("work", 2):
        raise RuntimeError("inside")


def test_progress_is_told_in_equal_steps_and_no_tensor_is_read_between(clock):
    told, loss = [], torch.zeros(()).as_subclass(Read)
    clock.now = 0.0
    bar = Bar("work", 1000, tell=lambda **values: told.append(values), times=4)
    bar.shown = 1e9  # no line is shown
    for done in range(1, 1001):
        bar.at(done, loss=loss, images=done // 2)
    assert told[:-1] == [{"done": done, "total": 1000, "loss": 0.125, "images": done // 2} for done in (250, 500, 750)]
    assert told[-1]["done"] == 1000
    assert Read.count == 5  # four told, and the last one shown
