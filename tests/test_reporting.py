"""What the report says of each client."""

import logging
from pathlib import Path

import torch

from server import reporting
from smi_fed.pipeline import Score
from smi_fed.strategies.round_record import Verdict
from smi_fed.teachers import StoredTeacher
from tests.models import small_spec


def test_a_teacher_that_guesses_is_warned_of(caplog):
    teacher = StoredTeacher(Path(), torch.device("cpu"), "", "St Mary", small_spec(), 10)
    verdicts = [Verdict(1, teacher=teacher, train_loss=0.1), Verdict(2, reason="late"), Verdict(3, teacher=teacher)]
    with caplog.at_level(logging.WARNING, "smi_fed"):
        lines = reporting._clients(verdicts, [Score(0.1, 0.1, 10), Score(0.9, 0.9, 10)])
    assert [line["test_accuracy"] for line in lines] == [0.1, None, 0.9]
    assert [bool(line["warning"]) for line in lines] == [True, False, False]
    assert "St Mary: 10.0 % of the test images of its classes is near chance" in caplog.text
