"""The study of methods: small, but whole."""

import json
import time

import pytest
import torch

from clients.app import own_images
from simulations import compare, methods, why_random
from simulations.local_clients import trained_clients
from simulations.methods import CONTROLS, METHODS, report
from simulations.runner.loop import parsed, planned
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


def plan(study, output, *words):
    return planned(study, parsed(study, ["--output", str(output), *words]), output, {})


def test_every_method_has_settings_that_hold(tmp_path):
    cells = plan(methods.STUDY, tmp_path, "--data", "digits", "--settings", "one")
    names = [(cell["method"], cell["iterations"]) for cell in cells]
    assert sorted(names) == sorted([(m, b) for m in METHODS for b in (20, 40)] + [(c, 0) for c in CONTROLS])


def test_stops_move_with_the_budget():
    config = InversionConfig.paper(iterations=40, schedule="5:0.5,10:0.5")
    assert str(config.scaled(20).schedule) == "2:0.5,5:0.5"


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(("data", "more"), [("digits", ["rebirth", "relabelled"]), ("shapes", [])])
def test_a_study_writes_lines_and_a_picture_and_goes_on(tmp_path, data, more):
    names = ["random", "rebirth, equal trajectories", *more, *CONTROLS]
    arguments = ["--output", str(tmp_path), "--data", data, "--settings", "one", "--budgets", "8", "--methods", *names,
                 "--seeds", "3", "--", *TINY]  # fmt: skip
    assert methods.main(arguments) == 0
    ledger = tmp_path / "pieces.jsonl"
    lines = [json.loads(each) for each in ledger.read_text().splitlines()]
    assert sorted(each["method"] for each in lines) == sorted(names)
    images = {each["method"]: each["images"] for each in lines}
    assert {images[name] for name in names if name != "rebirth, equal trajectories"} == {4}
    assert images["rebirth, equal trajectories"] > 4
    assert all(each["seed"] == 3 and 0 <= each["student_test_accuracy"] <= 1 for each in lines)
    assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"
    before = ledger.read_text()
    assert methods.main(arguments) == 0
    assert ledger.read_text() == before


def test_real_images_are_the_clients_own_of_the_classes_asked_for(tmp_path):
    (cell,) = plan(methods.STUDY, tmp_path, "--data", "digits", "--settings", "one", "--methods", "real", *TINY)
    teachers = trained_clients(cell.settings, 1, tmp_path)
    (images,) = methods.control("real", cell.settings, teachers)
    own = own_images(cell.settings, 0, 1, teachers[0].model.spec)
    for pixels, target in zip(images.images, images.targets, strict=True):
        same = (own.images == pixels).flatten(1).all(1)
        assert int(target) in own.labels[same].tolist()


def test_a_method_is_set_beside_random_in_the_cells_that_all_methods_have():
    easy, hard = {"iterations": 40}, {"iterations": 20}
    lines = [
        line("random", 0, accuracy=0.5, **hard), line("random", 0, accuracy=0.9, **easy),
        line("random", 1, accuracy=0.6, **easy), line("random", 0, accuracy=0.1, data="shapes", **easy),
        line("all", 0, accuracy=0.9, **hard), line("all", 0, accuracy=0.8, **easy),
        line("all", 1, accuracy=0.9, **easy), line("all", 0, accuracy=0.9, data="shapes", **easy),
        line("few", 0, accuracy=0.95, **easy), line("few", 1, accuracy=0.55, **easy),
        line("few", 2, accuracy=0.1, **easy), line("noise", 0, 0, 0.0),
    ]  # fmt: skip
    gains = report.over_reference(lines)
    assert gains == {"all": pytest.approx([-10, 30]), "few": pytest.approx([5, -5])}  # not +35 over four cells
    (table,) = report.table(lines)
    shown = {row[0]: row[-1] for row in table.rows}
    assert shown == {**shown, "all": "+10.0 (1 of 2)", "few": "+0.0 (1 of 2)", "random": "", "noise": ""}


def test_of_a_cell_that_was_measured_twice_the_last_counts():
    lines = [line("random", accuracy=0.5), line("ours", accuracy=0.5), line("ours", accuracy=0.6)]
    assert report.over_reference(lines) == {"ours": pytest.approx([10])}


def test_without_random_nothing_is_set_beside_it():
    assert report.over_reference([line("ours")]) == {"ours": []}
    assert report.over_reference([line("noise", iterations=0)]) == {}


def test_controls_alone_are_shown():
    (table,) = report.table([line("noise", iterations=0, seconds=0.0)])
    assert table.rows[1] == ["noise", "50.0", ""]


def test_spread_is_mean_and_deviation():
    assert report.spread([50.0, 60.0, 70.0]) == "60.0 ± 10.0"
    assert report.spread([50.0]) == "50.0"


def test_evenness():
    assert why_random.evenness(torch.tensor([[0, 1], [2, 3]]), 4) == pytest.approx(1)
    assert why_random.evenness(torch.tensor([[0], [0]]), 4) == pytest.approx(0)


def test_why_random_measures_every_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(why_random, "IMAGES", 6)
    monkeypatch.setattr(why_random, "LOOKS", (0, 1))
    overrides = [*TINY, "inversion.iterations=2", "inversion.schedule="]
    assert why_random.main(["--output", str(tmp_path), "--", *overrides]) == 0
    found = [json.loads(each) for each in (tmp_path / "pieces.jsonl").read_text().splitlines()]
    assert [each["data"] for each in found] == ["digits", "shapes"]
    assert found[0].get("object") is None
    assert 0 < found[1]["object"] < 1
    assert all(0 <= value <= 1 for each in found for value in each["agreement"]["attention"])


def test_compare_is_a_preset_of_the_study_of_methods(tmp_path):
    cells = plan(compare.STUDY, tmp_path, "--seeds", "1")
    names = [(cell["iterations"], cell["method"]) for cell in cells]
    assert names == [(budget, method) for budget in (20, 40, 80) for method in ("dense", "attention", "random")]
    for cell in cells:
        inversion = cell.settings.inversion.scaled(cell["iterations"])
        stops = {20: "3:0.5", 40: "6:0.5", 80: "13:0.5"}[cell["iterations"]]
        assert str(inversion.schedule) == ("" if cell["method"] == "dense" else stops)
        assert cell["method"] in ("dense", inversion.selection)
        assert (cell["clients"], cell.settings.seed, cell.settings.server.images_per_teacher) == (4, 1, 200)


@pytest.mark.usefixtures("uncounted")
def test_compare_measures_by_the_clock_of_methods_and_draws(tmp_path, monkeypatch, capsys):
    times = iter(range(0, 1000, 3))
    monkeypatch.setattr(methods, "clock", lambda device: float(next(times)))
    monkeypatch.setattr(compare, "BUDGETS", (8,))
    words = ["--output", str(tmp_path), "--clients", "2", "--seeds", "1", *TINY]
    assert compare.main(words) == 0
    lines = [json.loads(each) for each in (tmp_path / "pieces.jsonl").read_text().splitlines()]
    assert [each["inversion_seconds"] for each in lines] == [6.0] * 3  # two teachers of 3 seconds
    assert {each["schedule"] for each in lines if each["method"] != "dense"} == {"1:0.5"}
    assert (tmp_path / "convergence.png").read_bytes()[:4] == b"\x89PNG"
    assert "80%, random: 0 of 1 seeds reach it" in capsys.readouterr().out


def test_the_clock_is_of_the_process_on_a_cpu_and_waits_for_a_gpu(monkeypatch):
    started = methods.clock(torch.device("cpu"))
    time.sleep(0.3)
    assert methods.clock(torch.device("cpu")) - started < 0.2
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    started = methods.clock(torch.device("cuda"))
    time.sleep(0.05)
    assert methods.clock(torch.device("cuda")) - started > 0.04
    assert waited == [torch.device("cuda")] * 2


def test_seconds_to_a_target_are_of_the_cheapest_budget_that_holds_it():
    curve = [
        line("dense", iterations=i, accuracy=a, seconds=s)
        for i, a, s in ((20, 0.9, 5.0), (40, 0.7, 9.0), (80, 0.9, 30.0))
    ]
    assert compare.seconds_to(curve, 0.8) == 30.0
    assert compare.seconds_to(curve[:1], 0.8) == 5.0
    dense, random = curve[2], line("random", iterations=20, accuracy=0.82, seconds=3.0)
    (table,) = compare.table([dense, random])
    assert table.rows[1:] == [
        ["dense", "", "", "90.0 (30 s)"],
        ["attention", "", "", ""],
        ["random", "82.0 (3 s)", "", ""],
    ]
    assert table.notes[2] == "80%, random: 1 of 1 seeds reach it, 3.0 s, 10.00 times as fast as the cheapest dense"
