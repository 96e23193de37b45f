"""Keep measured results and write the tables of README and docs/ from them.

`python -m simulations.results --demo runs/demo0 runs/demo1 runs/demo2 --compare runs/compare` copies the reports and
lines to benchmarks/results/, the pictures to docs/, and fills the pages between their markers. Without arguments it
fills them from what is kept; `simulations.throughput` writes there itself (`out=`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulations import (
    amortised,
    asking,
    attention,
    baselines,
    compare,
    context,
    convergence,
    crowded,
    hostile,
    methods,
    owners,
    privacy,
    projection,
    quantizing,
    rounds,
    scale,
    schedule,
    server_time,
    stragglers,
    transfer,
    warm_start,
    why_random,
)
from simulations.runner import Study, Table, publication
from simulations.runner.ledger import PROJECT
from simulations.throughput.table import published
from smi_fed.files import write_json
from smi_fed.progress import show_log
from smi_fed.report import read_report

RESULTS = PROJECT / "benchmarks" / "results"
_ALL = (
    amortised, asking, attention, baselines, compare, context, convergence, crowded, hostile, methods, owners, privacy,
    quantizing, rounds, scale, schedule, server_time, stragglers, transfer, warm_start, why_random,
)  # fmt: skip
STUDIES: tuple[Study, ...] = tuple(each.STUDY for each in _ALL)


def main(arguments: list[str] | None = None) -> int:
    """Copy what is named, then fill the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, nargs="+", help="artefact directories of demo runs")
    for study in STUDIES:
        words = f"output directories of simulations.{study.name}"
        parser.add_argument(f"--{study.name}", type=Path, nargs="+", help=words)
    options = parser.parse_args(arguments)
    show_log()
    try:
        for study in STUDIES:
            if directories := getattr(options, study.name):
                publication.keep(study, directories, PROJECT)
        if options.demo:
            reports = [read_report(path / "report.json") for path in options.demo]
            write_json(RESULTS / "demo.json", {"cpus": os.cpu_count(), "reports": reports})
            shutil.copy(options.demo[0] / "synthetic.png", PROJECT / "docs" / "synthetic.png")
    except (OSError, ValueError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    for file in sorted({file for file, _ in SECTIONS.values()}):
        page = PROJECT / file
        page.write_text(filled(page.read_text(encoding="utf-8"), file), encoding="utf-8")
    return 0


def filled(text: str, file: str) -> str:
    """The page `file` with its tables as the kept results have them, see `publication.filled`."""
    return publication.filled(text, file, SECTIONS)


def demo_table() -> str:
    """A Markdown table of the demo's seeds."""
    kept = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    headings = ["seed", "clients, %", "ensemble, %", "student, %", "patches kept", "FLOPs below dense",
                "seconds: train, invert, distill, total"]  # fmt: skip
    note = (
        f"Held-out test split, last step, on {kept['reports'][0]['device']}, {kept['cpus']} cores; `python -m "
        "simulations.demo --output runs/demoN seed=N`, [raw reports](benchmarks/results/demo.json). Totals are without "
        "the start of Flower and Ray."
    )
    return publication.markdown(Table(rows=[headings, *map(_demo_row, kept["reports"])], notes=[note]))


def _demo_row(report: dict[str, Any]) -> list[str]:
    clients = ", ".join(f"{100 * each['test_accuracy']:.1f}" for each in report["clients"])
    inversion, seconds = report["inversion"], report["seconds"]
    return [
        str(report["seed"]), clients, f"{100 * report['ensemble']['test_accuracy']:.1f}",
        f"**{100 * report['student']['test_accuracy']:.1f}**", f"{inversion['kept_fraction']:.0%}",
        f"{1 - inversion['flops'] / inversion['dense_flops']:.0%}",
        ", ".join(f"{seconds[stage]:.0f}" for stage in ("train", "inversion", "distillation", "total")),
    ]  # fmt: skip


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("README.md", demo_table),
    "throughput": ("docs/cost.md", lambda: published(RESULTS)),
    "projection": ("docs/many-clients.md", projection.section),
    **{
        study.name: (study.page.file, lambda study=study: publication.section(study, RESULTS))
        for study in STUDIES
        if study.page is not None
    },
}
"""The page in which each section stands, and what writes it."""


if __name__ == "__main__":
    sys.exit(main())
