"""A run's report as one page, report.html: nothing in it is loaded from elsewhere, and no script runs.

`python -m smi_fed.report_page DIRECTORY [--real FOLDER]` makes it anew from a run's directory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, ImageSet
from smi_fed.data.sources import find_images
from smi_fed.files import FileFormatError, replacing
from smi_fed.layers import dotted
from smi_fed.report import COLOURS, lateness, read_report
from smi_fed.report_pictures import SIDE, chart, pictures
from smi_fed.report_template import TEMPLATE

LIGHT = {**COLOURS, "page": "#f6f7f9", "card": "#ffffff", "ink": "#1a1d21", "quiet": "#5c636b", "edge": "#dde1e6"}
DARK = {
    "student": "#3d9be0", "ensemble": "#f0a400", "client": "#868c94", "rest": "#f2d5ee",
    "page": "#101215", "card": "#16191d", "ink": "#e9ecef", "quiet": "#a3abb3", "edge": "#2c3238",
}  # fmt: skip


def write_page(directory: str | os.PathLike[str], real: ImageSet | None = None) -> Path:
    """Write report.html into a run's directory, from its report.json and its images.

    Args:
        real: images to show beside the synthetic ones of the classes of the same names.

    Raises:
        FileNotFoundError, FileFormatError: the report, or images that it names, are not there or damaged.
    """
    directory = Path(directory).absolute()
    report, path = read_report(directory / "report.json"), directory / "report.html"
    with replacing(path) as part:
        shown = pictures(report, directory / "synthetic", real)
        html = page(report, directory.name, shown)
        part.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")  # JSON may have half a character
    return path


def page(report: Mapping[str, Any], name: str, shown: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML; every text in the report is taken as text.

    Args:
        report: report.json, of a run that failed too.
        name: of the run.
        shown: what `pictures` made.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "duration": duration}
    rounds, known = report.get("rounds", ()), ("status", "seed", "strategy", "device")
    return environment.from_string(TEMPLATE).render(
        name=name, light=LIGHT, dark=DARK, reason=report.get("reason", ""),
        about=", ".join(f"{key} {report[key]}" for key in known if key in report),
        tiles=_tiles(report) if rounds else [], charts=_charts(rounds), clients=_clients(report), rounds=rounds,
        asked=bool(report.get("evaluation")),
        refused=[{**each, "round": line["round"]} for line in rounds for each in line.get("refused", ())],
        pictures=shown, stages=_stages(report.get("seconds")), settings=list(dotted(report.get("settings", {}))),
        versions=", ".join(f"{key} {each}" for key, each in report.get("versions", {}).items()),
    )  # fmt: skip


def percent(share: float | None) -> str:
    """A share in [0, 1] as text; None is empty."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as text."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, number, note) of what a reader looks for first."""
    measured, ensemble, inversion = report.get("evaluation") or {}, report["ensemble"] or {}, report["inversion"]
    student, clients, tiles = report["student"]["test_accuracy"], report["clients"], []
    if student is not None:
        tiles.append(("Student", percent(student), "of the test split"))
    if measured.get("mean"):
        note = f"of what they hold out; worst {percent(measured['worst']['student_accuracy'])}"
        tiles.append(("Student at the clients", percent(measured["mean"]["student_accuracy"]), note))
    if ensemble.get("test_accuracy") is not None:
        tiles.append(("Ensemble", percent(ensemble["test_accuracy"]), f"weighted by {ensemble['weights']}"))
    if clients:
        admitted = sum(each["admitted"] for each in clients)
        tiles.append(("Clients admitted", f"{admitted} of {len(clients)}", "in the last round"))
    if inversion:
        saved = 1 - inversion["flops"] / (inversion["dense_flops"] or inversion["flops"] or 1)
        note = f"{percent(inversion['kept_fraction'])} of the patches kept, {percent(saved)} of dense FLOPs saved"
        tiles.append(("Synthetic images", str(inversion["images"]), note))
    return [*tiles, ("Time", duration(report["seconds"]["total"]), f"rounds: {len(report['rounds'])}")]


def _clients(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the clients, with what they measured and how often they were admitted; last of ensemble and student."""
    measured, nothing = report.get("evaluation") or {}, {"images": 0, "student_accuracy": None, "own_accuracy": None}
    there = {each["node"]: each for each in measured.get("clients", ())}
    blank = {"node": "", "architecture": "", "start": "", "num_examples": "", "test_accuracy": None, "note": ""}
    # Of a strategy that ran by itself only what clients measured is known.
    alone = [{"node": node, "name": each["name"], "admitted": True} for node, each in there.items()]
    rows = []
    for each in report.get("clients") or alone:
        own = there.get(each["node"], nothing)
        times = sum(each["name"] in line.get("admitted", ()) for line in report["rounds"])
        late = each["admitted"] and lateness(each.get("age", 0))
        notes = [each.get("reason"), each.get("doubt"), each.get("warning"), own.get("reason"), late]
        note = "; ".join(filter(None, notes))
        rows.append({**blank, **each, "kind": "client", "there": own, "times": times, "note": note})
    for kind in ("ensemble", "student"):
        if report.get(kind):
            own = (measured.get("mean") if kind == "student" else None) or nothing
            rows.append({**blank, **report[kind], "kind": kind, "name": kind, "there": own})
    return rows


def _stages(seconds: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """The run's seconds by what they were spent on."""
    if not seconds:
        return []
    parts = {"waiting for clients": "train", "inversion": "inversion", "distillation": "distillation"}
    found = {name: seconds[key] for name, key in parts.items()}
    found["the rest"] = max(0.0, seconds["total"] - sum(found.values()))
    whole = sum(found.values()) or 1.0
    colours = ("client", "ensemble", "student", "rest")
    return [{"name": name, "colour": colour, "seconds": each, "share": each / whole}
            for (name, each), colour in zip(found.items(), colours, strict=True)]  # fmt: skip


def _charts(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over rounds, where there are several; the loss over the steps of all rounds."""

    def there(line: Mapping[str, Any], which: str) -> float | None:
        return ((line.get("evaluation") or {}).get(which) or {}).get("student_accuracy")

    scores = {
        ("student, test split", "student", ""): [(line["round"], line["student_test_accuracy"]) for line in rounds],
        ("student, mean over clients", "ensemble", ""): [(line["round"], there(line, "mean")) for line in rounds],
        ("student, worst client", "rest", "5 4"): [(line["round"], there(line, "worst")) for line in rounds],
    }
    shown = {key: [(x, 100 * y) for x, y in line if y is not None] for key, line in scores.items()}
    shown = {key: line for key, line in shown.items() if len(line) > 1}
    losses, before = list[tuple[float, float]](), 0
    for line in rounds:
        taught = line.get("distillation") or {}
        losses += [(before + step, loss) for step, loss in taught.get("losses", ()) if 0 < loss < math.inf]
        before += taught.get("steps", 0)
    charts = [chart("Accuracy in %", "round", shown, "%.1f %%")] if shown else []
    loss = {("loss", "student", ""): losses}
    return [*charts, chart("Student's loss", "distillation step", loss, "%.3g", log=True)] if losses else charts


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page of a run anew; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of a run: report.json and synthetic/")
    parser.add_argument("--real", help="folder with a directory of images for each class, shown beside the synthetic")
    options = parser.parse_args(arguments)
    try:
        real = options.real and DataConfig(source="folder", name=options.real, image_size=SIDE, channels=3)
        print(write_page(options.directory, find_images(real, every_class=False)[0] if real else None))
    except (SettingError, FileFormatError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
