"""The next lesson is made by a thread while the student takes its steps, and nothing comes out otherwise."""

import gc
import threading
import weakref
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch

from smi_fed.ahead import ahead
from smi_fed.distillation import distill, loop
from smi_fed.lazy import Lazily
from smi_fed.teachers import TrainedTeacher, store
from tests.models import small_vit
from tests.test_distillation import fresh, same_weights, seeded
from tests.test_distillation_in_turn import CONFIG
from tests.test_sparse_images import sparse

CPU, STEPS = torch.device("cpu"), 40
LONG = replace(CONFIG, steps=STEPS)
THREAD = "smi-fed-ahead"


def threads():
    return [each for each in threading.enumerate() if each.name.startswith(THREAD)]


def test_the_next_piece_is_made_while_the_last_one_is_used():
    begun = [threading.Event() for _ in range(4)]

    def piece(number):
        begun[number].set()
        return number, threading.current_thread().name

    found = []
    for number, name in ahead([partial(piece, number) for number in range(4)], CPU):
        found.append(number)
        assert name.startswith(THREAD)
        assert number == 3 or begun[number + 1].wait(10)
        assert number > 1 or not begun[number + 2].is_set()  # one piece ahead, no more
    assert found == [0, 1, 2, 3]
    assert not threads()


def test_what_a_piece_raises_comes_in_its_place():
    def fails():
        raise ZeroDivisionError("the second")

    pieces = ahead([lambda: 1, fails, lambda: 3], CPU)
    assert next(pieces) == 1
    with pytest.raises(ZeroDivisionError, match="the second"):
        next(pieces)
    assert not threads()


def test_who_leaves_early_leaves_no_thread_and_at_most_two_pieces():
    class Big:
        pass

    alive, most = [], []

    def piece():
        found = Big()
        alive.append(weakref.ref(found))
        gc.collect()
        most.append(sum(each() is not None for each in alive))
        return found

    with closing(ahead([piece] * 9, CPU)) as pieces:
        for made in pieces:
            del made
            if len(alive) > 6:
                break
    assert not threads()
    assert len(alive) in (7, 8)
    assert max(most) <= 2


class Speaking(torch.nn.Module):
    """A teacher that tells in which thread it was asked."""

    def __init__(self, model, heard):
        super().__init__()
        self.model, self.heard = model, heard

    def forward(self, images):
        self.heard.append(threading.current_thread().name.startswith(THREAD))
        return self.model(images)


CASES = {
    "plain": ({}, {}, True),
    "some tokens": ({"tokens": "mixed"}, {}, True),
    "held out": ({"validation": 0.3, "patience": 2}, {}, True),
    "asked once": ({"mixup": 0.0, "jitter": 0, "batch_size": 8}, {}, False),
    "augmented": ({"augmentation": "standard"}, {}, False),
    "dropout": ({}, {"drop_rate": 0.3}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_student_is_that_of_doing_all_in_turn(monkeypatch, tmp_path, case):
    """Teachers are loaded from disk each time, which builds models; and torch's own state is as it was."""
    changes, student, apart = CASES[case]
    stored = [store(TrainedTeacher(f"t{i}", small_vit(i), 10), tmp_path / f"{i}.model") for i in range(2)]
    heard, found = [], []
    teachers = Lazily(stored, lambda each: Speaking(each.load().model, heard))
    for way in (ahead, lambda pieces, _: loop.in_turn(pieces)):
        monkeypatch.setattr(loop, "ahead", way)
        torch.manual_seed(7)
        model = fresh(**student)
        record = distill(
            model, teachers, [sparse(5, seed=1), sparse(4, seed=2)], replace(LONG, **changes), generator=seeded()
        )
        found.append((model.state_dict(), record.losses, record.kept, torch.rand(2).tolist(), any(heard)))
        heard.clear()
    assert same_weights(found[0][0], found[1][0])
    assert found[0][1:4] == found[1][1:4]
    assert [each[4] for each in found] == [apart, False]
    assert not threads()


def test_an_error_of_a_teacher_amid_the_run_reaches_the_caller():
    class Failing(Speaking):
        def forward(self, images):
            if len(self.heard) > 20:
                raise RuntimeError("the disk is full")
            return super().forward(images)

    student = fresh()
    with pytest.raises(RuntimeError, match="the disk is full"):
        distill(student, [Failing(small_vit(1), [])], sparse(), LONG, generator=seeded())
    assert not student.training
    assert not threads()
