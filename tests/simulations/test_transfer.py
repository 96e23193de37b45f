"""The study of what images carry from a teacher to a student: small, but whole."""

import json

import pytest
import torch

from simulations import curve as curve_module
from simulations import transfer
from simulations.curve import Curve
from simulations.runner.ledger import digest
from simulations.runner.loop import parsed, planned
from simulations.transfer import STUDY, School, count_of, school_of, without_stops
from simulations.transfer_report import figure, mean_curve, table
from smi_fed.models import build_seeded
from smi_fed.pipeline import distill_student, seeded

TINY = ["--data", "digits", "--smoke", "--seeds", "3", "distillation.steps=4", "distillation.batch_size=8",
        "client.training.steps=2"]  # fmt: skip


def composed(data, source, *words):
    cells = STUDY.cells(parsed(STUDY, ["--data", data, "--sources", source, *words]))
    return [(STUDY.compose((*each.defaults, *each.overrides)), each) for each in cells]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One directory, so that the teacher is trained once."""
    return tmp_path_factory.mktemp("transfer")


@pytest.mark.parametrize("data", ["real", "shapes"])
def test_sources_differ_in_their_stops_alone(data):
    found = [composed(data, source, "--budgets", "images")[0][0] for source in ("dense", "sparse", "rebirth")]
    told = [(str(each.inversion.schedule), each.inversion.selection, each.inversion.stopping.kind) for each in found]
    assert told == [
        ("", "random", "keep"), ("2:0.5,5:0.5", "attention", "keep"), ("5:0.25,10:0.33,15:0.5", "random", "rebirth"),
    ]  # fmt: skip
    # Dense is not inverted again for its seconds.
    assert {digest(without_stops(each).inversion) for each in found} == {digest(found[0].inversion)}
    assert [(x.inversion.iterations, x.server.images_per_teacher, x.distillation.validation) for x in found] == [
        (20, 400, 0.0)
    ] * 3


@pytest.mark.parametrize(("data", "protocol", "trainable"), [("real", "head", "head"), ("real", "full", "all")])
def test_protocols_train_a_head_or_all_of_a_pretrained_student(data, protocol, trainable):
    ((settings, _),) = composed(data, "dense", "--protocols", protocol)
    assert (settings.distillation.trainable, settings.distillation.mixup) == (trainable, 0.0)
    assert str(settings.model.student.start).endswith("vit_small_patch14_dinov2.safetensors")


def test_seconds_buy_in_proportion_up_to_a_bound():
    ((settings, cell),) = composed("digits", "sparse", "--budgets", "seconds")
    dense, own = digest(without_stops(settings).inversion, 400), digest(settings.inversion, 400)
    for seconds, images in {(6.0, 2.0): 1200, (6.0, 4.0): 600, (9.0, 1.0): 3200, (1.0, 2.0): 200}.items():
        took = {dense: {"inversion_seconds": seconds[0]}, own: {"inversion_seconds": seconds[1]}}
        found = count_of(settings, cell, School(None, None, 0.5, took=took))
        assert found == (images, {"dense_seconds": seconds[0], "same_images_seconds": seconds[1]})


def test_looking_takes_no_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(curve_module, "clock", lambda _: now[0])

    def look():
        now[0] += 100
        return 0.5

    curve = Curve(look, 400, torch.device("cuda"))
    for step in range(1, 400):
        now[0] += 2
        curve.tell(done=step, total=400, loss=0.0)
    now[0] += 2
    curve.end(400)
    steps = [step for step, _, _ in curve.points]
    assert steps == [place**2 for place in range(21)]
    assert [seconds for _, seconds, _ in curve.points] == [2.0 * step for step in steps]


@pytest.mark.usefixtures("uncounted")
def test_a_study_keeps_curves(output):
    assert transfer.main(["--output", str(output), "--sources", "dense", "rebirth", *TINY]) == 0
    lines = [json.loads(each) for each in (output / "pieces.jsonl").read_text().splitlines()]
    dense, rebirth, bought = lines
    assert (dense["images"], rebirth["images"]) == (8, 8)
    assert (dense["budget"], rebirth["budget"], bought["budget"]) == ("images", "images", "seconds")
    both = dense["inversion_seconds"], rebirth["inversion_seconds"]
    assert (bought["dense_seconds"], bought["same_images_seconds"]) == both
    assert bought["images"] == max(1, min(64, int(8 * (both[0] / both[1]))))
    for line in lines:
        steps, seconds, accuracy = zip(*line["curve"], strict=True)
        assert steps == (0, 1, 2, 3, 4)
        assert list(seconds) == sorted(set(seconds))
        assert line["student_test_accuracy"] == accuracy[-1]
        assert all(64 * each == pytest.approx(round(64 * each), abs=1e-4) for each in accuracy)
    assert len({line["teacher_test_accuracy"] for line in lines}) == 1
    assert (output / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((output / "clients").iterdir())) == 1


def test_a_student_is_the_same_whether_one_looks_or_not(output):
    words = ["--output", str(output), "--sources", "noise", *TINY]
    (cell,) = planned(STUDY, parsed(STUDY, words), output, {})
    settings, school = cell.settings, school_of(cell.settings, cell)
    found, _ = transfer.pictures(settings, cell, school, 8)
    students = [build_seeded(settings.model.student, settings.seed) for _ in range(2)]
    curve = Curve(lambda: transfer.right(settings, students[0], school.test), 4, cell.device)
    for student, tell in zip(students, (curve.tell, None), strict=True):
        distill_student(student, [school.teacher], [found], settings.distillation, seeded(0), tell=tell)
    assert len(curve.points) == 5
    pairs = zip(students[0].state_dict().values(), students[1].state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.usefixtures("uncounted")
def test_warming_up_is_in_no_measurement(output, monkeypatch):
    monkeypatch.setattr(transfer, "_WARM", set())
    words = ["--output", str(output), "--sources", "sparse", "--budgets", "images", *TINY]
    (cell,) = planned(STUDY, parsed(STUDY, words), output, {})
    school = school_of(cell.settings, cell)
    before = dict(school.made), dict(school.took)
    transfer._warm(cell.settings, cell, school)
    assert len(transfer._WARM) == 2
    assert (school.made, school.took) == before
    monkeypatch.setattr(transfer, "taught", None)  # nothing is done twice
    transfer._warm(cell.settings, cell, school)


def line(source, curve, seed=0, budget="images", inversion=2.0, **more):
    return {
        "data": "digits", "protocol": "scratch", "source": source, "budget": budget, "seed": seed, "images": 100,
        "inversion_seconds": inversion, "curve": curve, "student_test_accuracy": curve[-1][2],
        "teacher_test_accuracy": 0.9, "environment": {"device_name": "Some CPU"}, **more,
    }  # fmt: skip


LINES = [
    line("dense", [[0, 0.0, 0.1], [1, 0.5, 0.73], [4, 2.0, 0.6], [9, 4.5, 0.8]]),  # 0.73 does not hold
    line("dense", [[0, 0.0, 0.1], [1, 0.5, 0.4], [4, 2.0, 0.55], [9, 4.5, 0.6]], seed=1),
    line("sparse", [[0, 0.0, 0.1], [1, 0.5, 0.5], [4, 2.0, 0.7], [9, 4.5, 0.7]], inversion=1.0),
    line("sparse", [[0, 0.0, 0.1], [1, 0.5, 0.6], [4, 2.0, 0.6], [9, 4.5, 0.6]], seed=1, inversion=1.0),
    line("noise", [[0, 0.0, 0.1], [1, 0.5, 0.1], [4, 2.0, 0.2], [9, 4.5, 0.2]], inversion=0.0, images=50),
]


def test_a_table_has_steps_and_seconds_to_both_ends(tmp_path):
    (found,) = table(LINES)
    assert found.rows[1:] == [
        ["digits", "scratch", "dense", "images", "100", "2.00", "70.0 ± 14.1", "6.5 ± 3.5 (3.25)", "6.5 ± 3.5 (3.25)"],
        ["digits", "scratch", "sparse", "images", "100", "1.00", "65.0 ± 7.1", "2.5 ± 2.1 (1.25)",
         "1.0 (0.50, 1 of 2)"],
        ["digits", "scratch", "noise", "images", "50", "0.00", "20.0", "4.0 (2.00)", "never"],
    ]  # fmt: skip
    assert found.notes == ["The teachers' own accuracy: digits 90.0 ± 0.0 %."]
    assert mean_curve(LINES[:2])[2] == pytest.approx([10, 56.5, 57.5, 70])
    figure(LINES).savefig(tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_without_dense_nothing_is_set_beside_it():
    assert [row[-1] for row in table(LINES[2:4])[0].rows[1:]] == [""]
