"""What the report says of each client."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from server import reporting
from smi_fed.config import ModelsConfig
from smi_fed.distillation import DistillationRecord
from smi_fed.pipeline import InversionRecord
from smi_fed.scores import Score
from smi_fed.starts import start_of
from smi_fed.strategies.round_record import Verdict, describe
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


def test_what_rounds_spent_is_added_and_kept_shares_are_weighed_by_images():
    rounds = [
        SimpleNamespace(
            inversions=[InversionRecord(2.0, 10, 40, 30, 0.25), InversionRecord(1.0, 5, 20, 10, 0.75)],
            distillation=DistillationRecord(7, 0.5, [1.0]), seconds=4.0,
        ),
        SimpleNamespace(
            inversions=[InversionRecord(0.5, 1, 4, 40, 0.5)], distillation=DistillationRecord(3, 0.25, [1.0]),
            seconds=1.0,
        ),
    ]  # fmt: skip
    assert reporting._inversions(rounds) == {
        "images": 80, "seconds": 3.5, "flops": 16, "dense_flops": 64,
        "kept_fraction": (30 * 0.25 + 10 * 0.75 + 40 * 0.5) / 80,
    }  # fmt: skip
    assert reporting._distillations(rounds)["steps"] == 10
    rounds[1].distillation.kept = "step 3"
    assert reporting._distillations(rounds)["kept"] == "step 3"
    seconds = reporting._seconds(rounds, [{"seconds": 6.0}, {"seconds": 9.0}], 9.5)
    assert seconds == {"train": 4.0, "inversion": 3.5, "distillation": 0.75, "total": 9.5}


def test_curves_of_losses_are_thinned_and_keep_their_end():
    assert reporting._thinned([]) == []
    assert reporting._thinned([3.0, 2.0]) == [[1, 3.0], [2, 2.0]]
    many = reporting._thinned([float(step) for step in range(1, 451)])
    assert many[-1] == [450, 450.0]
    assert many[0] == [5, 5.0]
    assert len(many) == 90


def test_what_the_settings_know_of_starts_is_told():
    student, other, deep = small_spec(), small_spec(depth=1), small_spec(depth=5)
    hub, file = replace(other, start="pretrained"), replace(deep, start="/weights.safetensors")
    of = reporting.start_by_settings
    models = ModelsConfig({"a": student, "b": hub, "c": file}, student)
    assert [of(describe(each), models) for each in (student, other, deep)] == ["random", "pretrained", "file"]
    assert of("resnet18", models) is None
    assert of(describe(other), ModelsConfig({"a": hub, "b": other}, student)) is None
    # Who has the student's architecture goes on from the student's start, and keeps its own where that is random.
    assert of(describe(student), ModelsConfig({"a": student}, replace(student, start="pretrained"))) == "pretrained"
    assert of(describe(student), ModelsConfig({"a": replace(student, start="pretrained")}, student)) == "pretrained"
    assert start_of(small_spec(pretrained=True)) == "pretrained"
    assert start_of(small_spec(checkpoint_path="/weights.pt")) == "file"
