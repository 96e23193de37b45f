"""The study of methods: small, but whole."""

import json

import pytest
import torch

from simulations import inversion_methods, methods_report, why_random
from simulations.inversion_methods import CONTROLS, METHODS, Study
from smi_fed.inversion import InversionConfig

TINY = [
    "client.training.steps=2", "server.images_per_teacher=4", "distillation.steps=2", "distillation.batch_size=4",
    "inversion.batch_size=4",
]  # fmt: skip


def line(method, seed=0, iterations=20, accuracy=0.5, data="digits", setting="one", seconds=1.0):
    return {
        "data": data, "setting": setting, "method": method, "seed": seed, "iterations": iterations,
        "student_test_accuracy": accuracy, "inversion_seconds": seconds,
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_hold(tmp_path, name):
    settings = Study(0, "digits", "one", [], tmp_path).configured(METHODS[name].overrides)
    for iterations in (20, 40):
        assert settings.inversion.scaled(iterations).iterations == iterations


def test_stops_move_with_the_budget():
    config = InversionConfig.paper(iterations=40, schedule="5:0.5,10:0.5")
    assert str(config.scaled(20).schedule) == "2:0.5,5:0.5"


@pytest.mark.parametrize("data", ["digits", "shapes"])
def test_a_study_writes_lines_and_a_picture_and_goes_on(tmp_path, data):
    names = ["random", "rebirth", "rebirth, equal trajectories", "relabelled", *CONTROLS]
    arguments = ["--output", str(tmp_path), "--data", data, "--settings", "one", "--budgets", "8", "--methods", *names,
                 "--seeds", "3", "--", *TINY]  # fmt: skip
    assert inversion_methods.main(arguments) == 0
    ledger = tmp_path / "pieces.jsonl"
    lines = [json.loads(each) for each in ledger.read_text().splitlines()]
    assert sorted(each["method"] for each in lines) == sorted(names)
    images = {each["method"]: each["images"] for each in lines}
    assert images["random"] == images["rebirth"] == images["noise"] == images["real"] == 4
    assert images["rebirth, equal trajectories"] > 4
    assert all(each["seed"] == 3 and 0 <= each["student_test_accuracy"] <= 1 for each in lines)
    assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"
    before = ledger.read_text()
    assert inversion_methods.main(arguments) == 0
    assert ledger.read_text() == before


def test_real_images_are_the_clients_own_of_the_classes_asked_for(tmp_path):
    study = Study(0, "digits", "one", TINY, tmp_path)
    study.trained()
    (images,) = study.controls("real")
    from clients.app import own_images

    own = own_images(study.settings, 0, 1, study.teachers[0].model.spec)
    for pixels, target in zip(images.images, images.targets, strict=True):
        same = (own.images == pixels).flatten(1).all(1)
        assert int(target) in own.labels[same].tolist()


def test_differences_are_paired_by_seed_and_budget():
    lines = [line("random", 0, accuracy=0.5), line("random", 1, accuracy=0.7), line("ours", 0, accuracy=0.6),
             line("ours", 1, accuracy=0.6), line("ours", 2, accuracy=0.9)]  # fmt: skip
    assert methods_report.over_reference(lines, "ours") == pytest.approx([10, -10])


def test_spread_is_mean_and_deviation():
    assert methods_report.spread([50.0, 60.0, 70.0]) == "60.0 ± 10.0"
    assert methods_report.spread([50.0]) == "50.0"


def test_evenness():
    assert why_random.evenness(torch.tensor([[0, 1], [2, 3]]), 4) == pytest.approx(1)
    assert why_random.evenness(torch.tensor([[0], [0]]), 4) == pytest.approx(0)


def test_why_random_measures_every_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(why_random, "IMAGES", 6)
    monkeypatch.setattr(why_random, "LOOKS", (0, 1))
    overrides = [*TINY, "inversion.iterations=2", "inversion.schedule="]
    assert why_random.main(["--output", str(tmp_path), "--", *overrides]) == 0
    found = json.loads((tmp_path / "why.json").read_text())["teachers"]
    assert [each["data"] for each in found] == ["digits", "shapes"]
    assert found[0].get("object") is None
    assert 0 < found[1]["object"] < 1
    assert all(0 <= value <= 1 for each in found for value in each["agreement"]["attention"])
