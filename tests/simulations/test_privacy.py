"""Audits made in shares, and what the study's lines say."""

import math

import pytest

from simulations.privacy import STUDY, NotJudgedError, figure, measure, share_of, table
from simulations.runner import Cell
from simulations.runner.loop import parsed, planned
from smi_fed.checks import SettingError


def line(mode, found, seed=0):
    leak = {"auc": 0.5 + found / 2, "at_0.1%": found / 2, "at_1%": found, "members": 7000, "others": 7000}
    held = {"model": leak, "student": leak, "images": {**leak, "at_1%": 0.01}}
    near = {"nearer": 0.5, "training": 0.4, "held_out": 0.3}
    return {
        "mode": mode, "seed": seed, "worlds": 16, "examples": held, "canaries": held, "ssim": near, "features": near,
        "accuracy": {"model": 0.9, "model on its own": 1.0, "student": 0.8}, "noise": 0.0,
    }  # fmt: skip


def test_what_is_found_by_mode_and_by_what_is_held(tmp_path):
    lines = [line("weights alone", 0.2), line("weights alone", 0.3, seed=1), line("epsilon 8", 0.0)]
    found, beside = table(lines)
    assert found.rows[1] == ["weights alone", "model", "12.5 ± 3.5", "25.0 ± 7.1", "0.625", *found.rows[1][2:5]]
    assert found.rows[3][:4] == ["", "images", "12.5 ± 3.5", "1.0 ± 0.0"]
    assert [row[0] for row in beside.rows[1:]] == ["weights alone", "epsilon 8"]
    assert beside.rows[2][1:5] == ["none", "100.0", "90.0", "80.0"]
    figure(lines).savefig(tmp_path / "privacy.png")
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")


def cells(output, *words):
    options = parsed(STUDY, ["--smoke", "--modes", "epsilon 8", "--seeds", "3", *words])
    return planned(STUDY, options, output, code="code")


def test_worlds_of_shares_are_judged_together(tmp_path):
    for share in ("1/2", "2/2"):
        (cell,) = cells(tmp_path, "--share", share)
        with pytest.raises(NotJudgedError, match="2 of 4 worlds"):
            measure(cell.settings, cell)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert sorted(path.name for path in made) == ["0.json", "1.json", "2.json", "3.json"]
    (cell,) = cells(tmp_path)
    found = measure(cell.settings, cell)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}  # none is made again
    assert found["noise"] == pytest.approx(40 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 8)
    assert found["canaries"]["images"]["members"] == 100
    assert found["accuracy"]["model"] < 0.3


def test_shares_part_the_worlds():
    shares = [share_of(Cell({"share": f"{part}/3", "worlds": 16})) for part in (1, 2, 3)]
    assert sorted(number for each in shares for number in each) == list(range(16))
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(SettingError, match="--share"):
            share_of(Cell({"share": wrong, "worlds": 16}))


def test_settings_follow_the_mode():
    found = {}
    for cell in STUDY.cells(parsed(STUDY, ["--modes", "without counts", "clipped"])):
        settings = STUDY.compose((*STUDY.words, *cell.overrides))
        found[cell["mode"]] = (settings.inversion.statistics > 0, settings.client.send_label_counts)
    assert found == {"without counts": (True, False), "clipped": (False, False)}
