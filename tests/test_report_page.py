"""report.html as text; tests/e2e/test_report_in_browser.py opens it."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fed.data import ImageSet
from smi_fed.report_page import DARK, LIGHT, main, page, write_page
from smi_fed.report_pictures import COLUMNS, chart, pictures
from tests.test_report import REPORT, measured
from tests.test_sparse_images import multi_label, sparse

OLD = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "demo.json"
HOSTILE = "\"'><script>document.title = 'ran'</script><img src=x onerror=alert(1)>{{ 7 * 6 }}"


class Page(HTMLParser):
    """What a browser would see: elements, attributes, the text of table rows, images."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self.images, self.text = set(), [], [], [], ""
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += f" {data}"
        if self.inside:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


def full():
    """A report with all that one can have: three rounds, refusals, what clients measured."""
    nodes = {"Nord": "1", "Mary": "2", "South": "3"}
    evaluation = measured()
    for line in (*evaluation["clients"], evaluation["worst"]):
        line["node"] = nodes[line["name"]]
    brief = {key: evaluation[key] for key in ("mean", "worst")}
    taught = {"steps": 20, "losses": [(10, 2.0), (20, 1.0)], "seconds": 3.0}
    spent = {"inversion": {"images": 40, "seconds": 2.0}, "distillation": taught}
    late = {"node": "3", "name": "South", "reason": "no reply in time"}
    return {
        **REPORT, "evaluation": evaluation, "strategy": "FedAvg", "classes": ["cat", "dog"],
        "settings": {"seed": 3, "data": {"name": "/data", "nodes": []}}, "versions": {"torch": "2"},
        "clients": [
            {"node": "1", "name": "Nord", "architecture": "vit", "num_examples": 120, "test_accuracy": 0.5,
             "admitted": True, "reason": "", "warning": "it guesses", "start": "random"},
            {"node": "3", "name": "South", "architecture": "", "num_examples": 0, "test_accuracy": None,
             "admitted": False, "reason": "no reply in time", "warning": "", "start": None},
        ],
        "rounds": [
            {"round": number, "student_test_accuracy": 0.2 * number, "seconds": 9.0 * number, "evaluation": brief,
             "admitted": ["Nord"], "refused": [late] if number > 1 else [], **spent} for number in (1, 2, 3)
        ],
    }  # fmt: skip


def with_texts(value, text):
    """The same with every text another, but for the few that the page goes by."""
    if isinstance(value, dict):
        return {key: each if key in ("status", "node") else with_texts(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [with_texts(each, text) for each in value]
    return text if isinstance(value, str) else value


def test_whatever_a_text_says_it_stays_a_text():
    shown = Page(page(with_texts(full(), HOSTILE), HOSTILE, []))
    plain = Page(page(with_texts(full(), "harmless"), "harmless", []))
    assert shown.tags == plain.tags
    assert "script" not in plain.tags | {name for name, _ in plain.attributes}
    assert [name for name, _ in shown.attributes] == [name for name, _ in plain.attributes]
    assert shown.text.count(HOSTILE) == plain.text.count("harmless") > 20


def test_nothing_comes_from_elsewhere():
    html = page(full(), "night", [])
    assert not re.findall(r"(?i)(?:https?:|//|url\(|@import|<link|<script|<base|javascript:)", html)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_rows_of_clients_tell_of_admission_refusal_and_scores():
    shown = Page(page(full(), "night", []))
    rows = {row[0]: row for row in shown.rows if row}
    assert rows["Nord 1"][1:5] == ["✓ admitted 3 of 3 rounds", "vit", "random", "120"]
    assert rows["Nord 1"][5:] == ["50.0 %", "90.0 % of 30", "75.0 %"]
    assert rows["South 3"] == ["South 3", "✕ refused 0 of 3 rounds", "", "", "0", "", "", ""]
    assert rows["student"][5:] == ["80.0 %", "80.0 % of 40", "75.0 %"]
    notes = [row[1] for row in shown.rows if len(row) == 2 and row[0] == ""]
    assert notes == ["it guesses", "no reply in time; no [bold] disk"]
    assert [row for row in shown.rows if row[-1:] == ["no reply in time"]] == [
        ["2", "South 3", "no reply in time"], ["3", "South 3", "no reply in time"],
    ]  # fmt: skip
    assert ["3", "60.0 %", "1", "1", "40", "2.0 s", "3.0 s", "27.0 s"] in shown.rows
    assert ["data.name", "/data"] in shown.rows
    for part in ("waiting for clients: 1.2 s (9.4 %)", "inversion: 10.0 s (75.5 %)", "student, worst client: 50.0 %",
                 "Student 80.0 %", "Clients admitted 1 of 2", "70.0 % of dense FLOPs saved", "loss: 1"):  # fmt: skip
        assert part in " ".join(shown.text.split()), part


def test_old_failed_and_plain_runs_have_a_page_too():
    old = Page(page(json.loads(OLD.read_text())["reports"][0], "old", []))
    assert [row[5] for row in old.rows if row and row[0].startswith("client 0")] == ["77.3 %"]
    failed = Page(page({"schema": 1, "status": "failed", "reason": "TooFewTeachersError: <none>"}, "night", []))
    assert "TooFewTeachersError: <none>" in failed.text
    alone = {**full(), "clients": [], "ensemble": None, "inversion": None}  # a strategy that ran by itself
    alone["rounds"] = [{key: each[key] for key in ("round", "student_test_accuracy", "seconds", "evaluation")}
                       for each in alone["rounds"]]  # fmt: skip
    assert {row[0] for row in Page(page(alone, "alone", [])).rows if row} >= {"Mary 2", "Nord 1", "South 3", "student"}


def test_a_chart_has_its_points_and_ticks_where_they_belong():
    found = chart("loss", "step", {("a", "student", ""): [(10, 0.1), (20, 1.0), (30, 10.0)]}, "%g", log=True)
    (line,) = found["lines"]
    (x1, y1), (x2, y2), (x3, y3) = line["points"]
    assert (x1, x3, line["label"]) == (found["left"], found["right"], "a: 10")
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert y1 - y2 == pytest.approx(y2 - y3)  # a decade each
    assert {(y2, "1"), (y1, "0.1"), (y3, "10")} <= set(found["yticks"])
    flat = chart("accuracy", "round", {("a", "student", ""): [(1, 5.0)]}, "%g")
    assert flat["lines"][0]["points"] == [(flat["left"], 100.0)]


def run_directory(tmp_path, found, classes=None):
    (tmp_path / "synthetic").mkdir(parents=True)
    found.save(tmp_path / "synthetic" / "one.safetensors")
    report = {**full(), "schema": 1, "classes": ["a", "b", HOSTILE, "d", "e"]}
    report["clients"][1]["reason"] = "half a character: \ud800"
    report["clients"][0]["images"] = {"file": "one.safetensors", "classes": classes}
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def decoded(image):
    kind, _, data = image["src" if "src" in image else "uri"].partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"), dtype=np.int64)


def test_images_stand_above_their_kept_patches_and_real_ones_of_their_class(tmp_path):
    found = replace(sparse(3, channels=3), targets=torch.tensor([1, 0, 1]))
    real = ImageSet(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 6) / 4, torch.tensor([0, 1, 1, 0]), ("d", "x"))
    directory = run_directory(tmp_path / "run", found, classes=[2, 3])  # its classes are the student's third and fourth
    shown = Page(write_page(directory, real).read_text(encoding="utf-8"))
    labels = next(row for row in shown.rows if HOSTILE in row)
    assert labels == ["", HOSTILE, "d", "d"]
    synthetic, kept, beside = shown.images[:3], shown.images[3:6], shown.images[6:]
    for row, image, below in zip([1, 0, 2], synthetic, kept, strict=True):
        pixels = (found.images[row] * 255).round().permute(1, 2, 0).long().numpy()
        assert np.array_equal(decoded(image)[..., :3], pixels)
        mask = found.mask[row].repeat_interleave(4, 0).repeat_interleave(2, 1).numpy()
        assert np.array_equal(decoded(below)[..., 3] > 0, mask)
        assert np.array_equal(decoded(below)[mask][:, :3], pixels[mask])
    assert [int(decoded(image)[0, 0, 0]) for image in beside] == [0, 191]  # the first and the second of class d
    assert [image["alt"] for image in beside] == ["real: d"] * 2
    without = Page(write_page(directory).read_text(encoding="utf-8"))
    assert len(without.images) == 6


def test_large_images_are_shrunk_and_images_of_many_labels_have_none(tmp_path):
    large = run_directory(tmp_path / "large", sparse(2 * COLUMNS, grid=(10, 20), patch=(16, 16), kept=9, channels=3))
    assert len((write_page(large)).read_bytes()) < 400_000
    (found,) = pictures(json.loads((large / "report.json").read_text()), large / "synthetic")
    assert [decoded(each).shape for each in found["rows"]["synthetic"]] == [(48, 96, 4)] * COLUMNS
    many = run_directory(tmp_path / "many", multi_label(sparse(2)))
    assert len(Page(write_page(many).read_text(encoding="utf-8")).images) == 4


def test_the_page_is_made_anew_by_a_command(tmp_path, capsys):
    directory = run_directory(tmp_path / "run", sparse(2))
    for name in "abcde":
        (tmp_path / "real" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 9), "red").save(tmp_path / "real" / name / f"{number}.png")
    assert main([str(directory), "--real", str(tmp_path / "real")]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert "real: " in (directory / "report.html").read_text(encoding="utf-8")
    (directory / "synthetic" / "one.safetensors").unlink()
    assert main([str(directory)]) == 1
    assert "one.safetensors" in capsys.readouterr().err


# Machado, Oliveira and Fernandes (2009), at full severity, in linear RGB.
SEEN = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / to_xyz.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """WCAG's."""
    low, high = sorted(0.05 + linear(each) @ [0.2126, 0.7152, 0.0722] for each in (one, other))
    return high / low


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_told_apart_whatever_cones_one_has(scheme):
    kinds = ("student", "ensemble", "client", "rest")
    for matrix in SEEN.values():
        seen = [lab(np.array(matrix) @ linear(scheme[kind])) for kind in kinds]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 25
    assert all(contrast(scheme[kind], scheme["card"]) >= 3 for kind in kinds)
    assert all(contrast(scheme[text], scheme[under]) >= 4.5 for text in ("ink", "quiet") for under in ("card", "page"))
    assert scheme.keys() == LIGHT.keys()
