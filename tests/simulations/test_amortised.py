"""Cells of the study of amortised inversion, and what its table pairs."""

from dataclasses import replace

from simulations.amortised import METHODS, STUDY, table
from simulations.runner.loop import parsed


def line(method, accuracy, seconds, seed, condition="core"):
    return {"condition": condition, "method": method, "seed": seed, "student_test_accuracy": accuracy,
            "inversion_seconds": seconds}  # fmt: skip


def test_each_method_is_held_against_the_reference_of_its_own_seed():
    lines = [
        line("dense, 400 x 10", 0.90, 10.0, 0), line("dense, 400 x 10", 0.80, 20.0, 1),
        line("mixtures, 2", 0.91, 1.0, 0), line("mixtures, 2", 0.83, 4.0, 1), line("mixtures, 2", 0.5, 4.0, 2),
    ]  # fmt: skip
    (only,) = table(lines)
    assert only.rows[1] == ["dense, 400 x 10", "85.0 ± 7.1", "0.0 ± 0.0", "15.0", "1.00"]
    assert only.rows[2][2:] == ["2.0 ± 1.4", "3.0", "0.15"]
    assert [each.title[:4] for each in table([*lines, line("mixtures, 2", 0.5, 4.0, 0, "real")])] == ["core", "real"]


def test_every_method_can_be_composed_on_both_federations():
    for condition in ("core", "real"):
        cells = STUDY.cells(parsed(STUDY, ["--condition", condition]))
        assert [cell["method"] for cell in cells] == list(METHODS)
        settings = STUDY.compose((*STUDY.words, *cells[4].defaults, *cells[4].overrides))
        assert (settings.inversion.selection, settings.inversion.stopping.kind) == ("random", "rebirth")
        assert settings.inversion.learning_rate == 0.4


def test_halves_have_as_many_images_as_the_others(tmp_path):
    (cell,) = STUDY.cells(parsed(STUDY, ["--smoke", "--methods", "rebirth in halves, closed loop"]))
    small = ("client.training.steps=2", "server.images_per_teacher=16", "distillation.steps=2", "data.alpha=10.0")
    settings = STUDY.compose((*cell.defaults, *cell.overrides, *small))
    found = STUDY.measure(settings, replace(cell, settings=settings, output=tmp_path))
    assert found["images"] == 4 * 16
    assert 0 < found["student_test_accuracy"] < 1
