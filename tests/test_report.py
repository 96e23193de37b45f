import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from smi_fed.files import FileFormatError
from smi_fed.report import (
    one_per_class,
    plot_curves,
    plot_evaluation,
    plot_images,
    print_summary,
    read_report,
)
from tests.test_sparse_images import multi_label, sparse


def test_a_report_of_endless_brackets_is_none(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("[" * 100_000)
    with pytest.raises(FileFormatError, match="truncated or not what it should be"):
        read_report(path)


def test_names_of_classes_are_no_formulas(tmp_path):
    plot_images(tmp_path / "x.png", [sparse(5)], ["client"], ["$\\frac{$"] * 5)
    assert (tmp_path / "x.png").stat().st_size > 1000


REPORT = {
    "status": "completed",
    "seed": 3,
    "device": "cpu",
    "seconds": {"train": 1.25, "inversion": 10.0, "distillation": 2.0, "total": 13.25},
    "clients": [
        {"name": "client 0", "architecture": "vit_tiny 64x3", "num_examples": 120, "test_accuracy": 0.5,
         "admitted": True, "reason": "", "bytes_from_client": 26_574},
        {"name": "node 77", "architecture": "", "num_examples": 0, "test_accuracy": None, "admitted": False,
         "reason": "not on the allow-list", "bytes_from_client": 0},
        {"name": "client 2", "architecture": "deit_tiny 48x2", "num_examples": 90, "test_accuracy": 0.615,
         "admitted": True, "reason": ""},
    ],
    "ensemble": {"weights": "class", "test_accuracy": 0.7256},
    "student": {"architecture": "vit_small 96x4", "parameters": 1000, "test_accuracy": 0.8},
    "inversion": {"method": "attention selection", "images": 600, "kept_fraction": 0.25, "flops": 30,
                  "dense_flops": 100},
    "rounds": [{"round": 1, "student_test_accuracy": 0.75, "seconds": 5.0},
               {"round": 2, "student_test_accuracy": 0.8, "seconds": 13.0}],
}  # fmt: skip


def summary(report):
    console = Console(width=110, file=io.StringIO())
    print_summary(report, console)
    return console.file.getvalue()


def test_the_summary_shows_everybody():
    text = summary(REPORT)
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert "completed, seed 3, on cpu" in text
    for name, parts in {
        "client 0": ("vit_tiny 64x3", "120", "50.0 %", "26.6 kB"),
        "client 2": ("deit_tiny 48x2", "90", "61.5 %"),
        "node 77": ("refused: not on the allow-list", " 0 ", "0 bytes"),
        "ensemble": ("weighted by class", "72.6 %"),
        "student": ("vit_small 96x4", "80.0 %"),
    }.items():
        assert all(part in lines[name] for part in parts), lines[name]
    assert "%" not in lines["node 77"]
    assert list(lines) == ["client 0", "node 77", "client 2", "ensemble", "student"]


@pytest.mark.parametrize(
    ("own", "start", "says"),
    [
        ("random", "own", "random"),
        ("pretrained", "pretrained", "pretrained (timm)"),
        ("file", "own", "pretrained (file)"),
        ("file", "average", "clients' average"),
        ("pretrained", "statistics", "pretrained (timm), head by class statistics"),
    ],
)
def test_the_summary_tells_where_models_started(own, start, says):
    clients = [{**REPORT["clients"][0], "start": "file"}, {**REPORT["clients"][2], "start": None}]
    text = summary({**REPORT, "clients": clients, "start": start, "student": {**REPORT["student"], "start": own}})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.count("│") > 3]
    assert [row[2] for row in rows[:2]] == ["pretrained (file)", ""]
    assert " ".join(row[2] for row in rows[3:]) == says  # the student's row and what goes on below it


def test_the_summary_tells_what_was_saved():
    text = " ".join(summary(REPORT).split())
    assert "seconds: train 1.2, inversion 10.0, distillation 2.0, total 13.2" in text
    assert "600 images, attention selection; 75% of the patches stopped by the end, 70% of dense FLOPs saved" in text
    uncounted = {**REPORT, "inversion": {**REPORT["inversion"], "flops": 0, "dense_flops": 0}}
    assert "0% of dense FLOPs saved" in " ".join(summary(uncounted).split())


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def measured(own=0.75):
    """Two clients that measured, and one that failed with brackets in its reason."""
    shown = {"own_accuracy": own}
    first = {"name": "Nord", "images": 30, "student_accuracy": 0.9, **shown, "reason": ""}
    second = {"name": "Mary", "images": 10, "student_accuracy": 0.5, **shown, "reason": ""}
    failed = {"name": "South", "images": 0, "student_accuracy": None, "own_accuracy": None, "reason": "no [bold] disk"}
    return {
        "clients": [second, first, failed], "worst": second,
        "mean": {"images": 40, "student_accuracy": 0.8, **shown},
        "per_class": [{"class": "cat", "images": 40, "student_accuracy": 0.8, **shown},
                      {"class": "dog", "images": 0, "student_accuracy": None, "own_accuracy": None}],
    }  # fmt: skip


def test_the_summary_tells_what_clients_measured():
    text = summary({**REPORT, "evaluation": measured()}).split("hold out")[1]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.count("│") > 3]
    assert rows == [
        ["Mary", "10", "50.0 %", "75.0 %"], ["Nord", "30", "90.0 %", "75.0 %"],
        ["South: no [bold] disk", "0", "", ""], ["weighted mean", "40", "80.0 %", "75.0 %"],
        ["worst: Mary", "10", "50.0 %", "75.0 %"],
    ]  # fmt: skip
    nothing = {**measured(), "clients": measured()["clients"][2:], "mean": None, "worst": None}
    assert "weighted mean" not in summary({**REPORT, "evaluation": nothing})


def test_the_picture_of_an_evaluation_shows_what_it_is_given(tmp_path):
    pictures = []
    for own in (0.75, 0.25, None):
        plot_evaluation(tmp_path / "evaluation.png", measured(own))
        pictures.append(pixels(tmp_path / "evaluation.png"))
    assert all(picture.std() > 10 for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2])
    assert [each.name for each in tmp_path.iterdir()] == ["evaluation.png"]


def test_curves_are_a_picture(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(path, [3.0, 2.0, 1.5, 0.2], REPORT["rounds"], REPORT["clients"], 0.7256)
    height, width, _ = pixels(path).shape
    assert 300 < height < width < 2000
    assert pixels(path).std() > 10
    assert [each.name for each in tmp_path.iterdir()] == ["curves.png"]


def test_curves_show_what_they_are_given(tmp_path):
    pictures = []
    for losses, ensemble in (([3.0, 1.0], 0.5), ([3.0, 2.0], 0.5), ([3.0, 1.0], 0.9)):
        plot_curves(tmp_path / "curves.png", losses, REPORT["rounds"], REPORT["clients"], ensemble)
        pictures.append(pixels(tmp_path / "curves.png"))
    middle = pictures[0].shape[1] // 2
    left, right = (slice(None), slice(0, middle - 10)), (slice(None), slice(middle + 10, None))
    assert not np.array_equal(pictures[0][left], pictures[1][left])
    assert np.array_equal(pictures[0][right], pictures[1][right])
    assert not np.array_equal(pictures[0][right], pictures[2][right])


@pytest.mark.parametrize("kind", ["grey", "colour", "multi-label", "many", "two teachers"])
def test_images_are_a_picture(tmp_path, kind):
    path = tmp_path / "synthetic.png"
    found = {
        "grey": [sparse(4)],
        "colour": [sparse(4, channels=3)],
        "multi-label": [multi_label(sparse(4))],
        "many": [sparse(40)],
        "two teachers": [sparse(4), sparse(4, grid=(2, 2), channels=3)],
    }[kind]
    plot_images(path, found, [f"client {i}" for i in range(len(found))], tuple("abcde"))
    height, width, _ = pixels(path).shape
    assert 600 < width < 1600
    assert 150 < height / len(found) < 400
    assert pixels(path).std() > 10
    assert [each.name for each in tmp_path.iterdir()] == ["synthetic.png"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fails(_figure, part, **_):
        Path(part).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(path, [1.0], REPORT["rounds"], REPORT["clients"], 0.5)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("targets", "count", "correct"),
    [
        ([2, 2, 0, 1, 0], 3, [2, 3, 0]),  # one of each class first, in the order of the classes
        ([2, 2, 0, 1, 0], 4, [2, 3, 0, 1]),
        ([2, 2, 0, 1, 0], 9, [2, 4, 3, 0, 1]),
        ([1, 1, 1], 2, [0, 1]),
        ([4, 3, 2, 1, 0], 2, [1, 0]),
    ],
)
def test_as_many_classes_as_fit_are_shown(targets, count, correct):
    found = replace(sparse(len(targets)), targets=torch.tensor(targets))
    assert one_per_class(found, count).ids.tolist() == correct


def test_siblings_of_one_trajectory_do_not_crowd_out_others():
    """Patch rebirth: ids 0 to 2 gave three images each, id 3 (of a class of its own) one."""
    found = replace(
        sparse(10), ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3]), targets=torch.tensor([0] * 6 + [1] * 3 + [2])
    )
    order = torch.arange(10)
    found = replace(found, teachers=order)  # which image is which
    assert one_per_class(found, 3).teachers.tolist() == [0, 6, 9]
    assert one_per_class(found, 4).teachers.tolist() == [0, 3, 6, 9]  # another trajectory before a sibling
    assert one_per_class(found, 6).teachers.tolist() == [0, 3, 1, 6, 7, 9]
    many = multi_label(replace(sparse(4), ids=torch.tensor([0, 0, 1, 1]), teachers=order[:4]))
    assert one_per_class(many, 2).teachers.tolist() == [0, 2]


def test_clients_of_one_name_do_not_share_a_bar(tmp_path):
    heights = []
    for names in (("Nord", "Nord"), ("Nord",)):
        clients = [{"name": name, "test_accuracy": 0.5, "admitted": True} for name in names]
        plot_curves(tmp_path / "curves.png", [1.0, 0.5], [], clients, 0.9)
        bars = (np.abs(pixels(tmp_path / "curves.png").astype(int) - [0x94, 0x94, 0x94]).sum(2) < 9).sum(1) > 50
        heights.append(np.diff(bars.astype(int)).clip(0).sum())
    assert heights == [2, 1]


def test_images_of_many_labels_are_shown_as_they_come():
    assert one_per_class(multi_label(sparse(4)), 2).ids.tolist() == [0, 1]
