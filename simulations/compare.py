"""Is sparse worth it? `python -m simulations.compare [--seeds 0 1 2] [OVERRIDE ...]`.

The same trained clients are distilled after dense, attention-sparse and random-sparse
inversion at several iteration budgets (settings: conf/experiment/compare.yaml). Each piece
is one JSON line, written when it is done; a run that was stopped goes on where it was. The
picture is student accuracy against inversion seconds.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from functools import partial

from simulations.methods import check, measure_piece, report
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.checks import require
from smi_fed.config import Settings
from smi_fed.convergence import reaches, speedup

METHODS = {
    "dense": ("inversion.schedule=''",),
    "attention": ("inversion.selection=attention",),
    "random": ("inversion.selection=random",),
}
BUDGETS = (20, 40, 80)
TARGETS = (0.80, 0.85)


def cells(options: Namespace) -> list[Cell]:
    """Each method at each budget."""
    require(options.clients >= 1, "clients", options.clients, "an int >= 1")
    return [
        Cell({"clients": options.clients, "method": method, "iterations": budget}, overrides)
        for budget in BUDGETS
        for method, overrides in METHODS.items()
    ]


def measure(settings: Settings, cell: Cell) -> Line:
    """A piece of the study of methods."""
    return measure_piece(settings, cell, cell["clients"])


def curves(lines: Lines) -> dict[tuple[int, str], list[Line]]:
    """Pieces by (seed, method), in order of iterations."""
    grouped: dict[tuple[int, str], list[Line]] = {}
    for line in sorted(lines, key=lambda each: each["iterations"]):
        grouped.setdefault((line["seed"], line["method"]), []).append(line)
    return grouped


def seconds_to(curve: Lines, target: float) -> float | None:
    """Inversion seconds of the cheapest budget from which on the student holds `target`."""
    held = reaches([p["student_test_accuracy"] for p in curve], [float(p["iterations"]) for p in curve], target)
    return next((p["inversion_seconds"] for p in curve if p["iterations"] == held), None)


def table(lines: Lines) -> list[Table]:
    """Accuracy by method and budget, and seconds to each target against dense: median (lowest to highest)."""
    seeds = seeds_of(lines)
    rows = [["method", *(f"{budget} iterations" for budget in BUDGETS)]]
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        rows.append([method, *(_cell([p for p in own if p["iterations"] == budget]) for budget in BUDGETS)])
    title = f"student test accuracy in % (inversion seconds), median (range) of seeds {seeds}"
    return [Table(title, rows, [_to_target(curves(lines), seeds, t, method) for t in TARGETS for method in METHODS])]


def _to_target(grouped: dict[tuple[int, str], list[Line]], seeds: list[int], target: float, method: str) -> str:
    own, dense = ([seconds_to(grouped.get((seed, name), []), target) for seed in seeds] for name in (method, "dense"))
    reached = [value for value in own if value is not None]
    ratios = [r for r in map(speedup, own, dense) if r is not None]
    return (
        f"{target:.0%}, {method}: {len(reached)} of {len(seeds)} seeds reach it"
        + (f", {_spread(reached)} s" if reached else "")
        + (f", {_spread(ratios, 2)} times as fast as the cheapest dense" if ratios else "")
    )


def _cell(here: Lines) -> str:
    if not here:
        return ""
    accuracy = _spread([100 * p["student_test_accuracy"] for p in here])
    return f"{accuracy} ({statistics.median(p['inversion_seconds'] for p in here):.0f} s)"


def _spread(values: list[float], digits: int = 1) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _note(lines: Lines) -> str:
    if all(line.get("clock") == "process" for line in lines):
        return ": seconds of the process, on one thread."
    return ", one thread; here each seed was a process of its own and two ran at a time on two cores."


STUDY = Study(
    name="compare", about=__doc__, cells=cells, measure=measure, table=table, picture="convergence.png",
    figure=partial(report.figure, targets=TARGETS), page=Page("docs/sparse.md", note=_note),
    words=("experiment=compare",), check=check,
    options=lambda parser: parser.add_argument("--clients", type=int, default=4, help="how many are trained"),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
