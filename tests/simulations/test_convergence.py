"""Cells of the study of convergence, and what its lines say."""

import json
from operator import attrgetter

import pytest

from simulations.convergence import CONDITIONS, METHODS, STUDY, main
from simulations.frontier import figure, inversion_seconds, seconds_to, server_seconds, table
from simulations.runner.loop import parsed


def line(method, iterations, images, accuracy, inversion=1.0, seed=0, **more):
    return {
        "condition": "core", "method": method, "iterations": iterations, "images_per_client": images, "seed": seed,
        "learning_rate": 0.1, "student_test_accuracy": accuracy, "inversion_seconds": inversion,
        "distillation_seconds": 10.0, **more,
    }  # fmt: skip


DENSE = [
    line("dense", 5, 100, 0.70, 4.0), line("dense", 10, 100, 0.86, 8.0),  # lucky: twice the images are worse
    line("dense", 5, 400, 0.83, 16.0), line("dense", 10, 400, 0.81, 32.0),
]  # fmt: skip
SPARSE = [line("random", 5, 100, 0.81, 3.0), line("random", 10, 100, 0.84, 5.0), line("random", 5, 400, 0.9, 9.0)]


@pytest.mark.parametrize(
    ("lines", "target", "inversion", "server"),
    [(DENSE, 0.80, 8.0, 18.0), (DENSE, 0.82, None, None), (SPARSE, 0.80, 3.0, 13.0), (SPARSE, 0.85, 9.0, 19.0)],
)
def test_a_target_counts_where_more_work_holds_it(lines, target, inversion, server):
    assert seconds_to(lines, lambda _: target, inversion_seconds) == inversion
    assert seconds_to(lines, lambda _: target, server_seconds) == server


def test_real_pictures_are_judged_by_their_ensemble():
    lines = [{**each, "condition": "real", "ensemble_test_accuracy": 0.87} for each in (*DENSE, *SPARSE)]
    _, targets = table(lines)
    assert targets.rows[0][1::2] == ["ensemble less 10, inversion", "ensemble less 5, inversion",
                                     "ensemble less 3, inversion"]  # fmt: skip
    assert targets.rows[2][1::2] == ["3.0, 2.67", "5.0", "5.0"]


def test_tables_hold_every_setting_against_the_cheapest_dense(tmp_path):
    rates = [line("dense", 10, 200, 0.5, condition="tuning", learning_rate=rate, seed=100) for rate in (0.1, 0.2)]
    controls = [line("noise", 0, 100, 0.1, 0.0), line("real", 0, 100, 0.95, 0.0)]
    lines = [*DENSE, *SPARSE, *controls, *rates]
    settings, targets, tuning = table(lines)
    assert settings.rows[0] == ["method", "100 x 5", "100 x 10", "400 x 5", "400 x 10"]
    assert settings.rows[2] == ["random", "81.0 (3.0)", "84.0 (5.0)", "90.0 (9.0)", ""]
    assert settings.rows[3] == ["noise", "10.0", "10.0", "", ""]
    assert targets.rows[1:] == [
        ["dense", "8.0, 1.00", "18.0, 1.00", "never", "never", "never", "never"],
        ["random", "3.0, 2.67", "13.0, 1.38", "9.0", "19.0", "9.0", "19.0"],
    ]
    assert tuning.rows == [["method", "0.1", "0.2"], ["dense", "50.0", "50.0"]]
    figure(lines).savefig(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_every_setting_of_every_condition_can_be_composed():
    cells = STUDY.cells(parsed(STUDY, ["--conditions", *CONDITIONS]))
    once = sum(condition.rounds == 1 for condition in CONDITIONS.values())
    assert len(cells) == len(CONDITIONS) * 2 * 3 * len(METHODS) + once * 2 * 2
    for cell in {each["condition"]: each for each in cells if each["method"] == "rebirth"}.values():
        settings = STUDY.compose((*STUDY.words, *cell.defaults, *cell.overrides))
        rounds = settings.strategy.rounds
        assert rounds == CONDITIONS[cell["condition"]].rounds
        assert settings.server.images_per_teacher * rounds == cell["images_per_client"]
        if cell["condition"] != "real":  # whose pictures and models may not be there
            STUDY.check(settings, cell)
    tried = STUDY.cells(parsed(STUDY, ["--conditions", "tuning", "--methods", "dense", "real"]))
    assert [(each["method"], each["learning_rate"]) for each in tried] == [("dense", x) for x in (0.1, 0.2, 0.4, 0.8)]


def test_rounds_share_out_the_work_of_one():
    core, rounds = (
        STUDY.compose((*STUDY.words, *cell.defaults, *cell.overrides))
        for condition in ("core", "5 rounds")
        for cell in STUDY.cells(parsed(STUDY, ["--conditions", condition, "--methods", "dense", "--images", "100"]))[:1]
    )
    for work in ("client.training.steps", "distillation.steps", "server.images_per_teacher"):
        each = attrgetter(work)
        assert each(rounds) * rounds.strategy.rounds == each(core), work


@pytest.mark.slow
def test_a_line_over_rounds(tmp_path):
    words = ["--smoke", "--conditions", "5 rounds", "--methods", "dense", "--images", "40", "--iterations", "5"]
    assert main([*words, "--seeds", "0", "--output", str(tmp_path), "strategy.rounds=2"]) == 0
    (found,) = map(json.loads, (tmp_path / "pieces.jsonl").read_text().splitlines())
    assert len(found["accuracy_by_round"]) == 2
    assert found["accuracy_by_round"][-1] == found["student_test_accuracy"]
    assert found["images"] == 2 * 4 * 8
    assert found["schedule"] == ""
