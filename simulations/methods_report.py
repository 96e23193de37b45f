"""Tables and the picture of `simulations.inversion_methods`, from its JSON lines."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from smi_fed.files import replacing

Line = dict[str, Any]
Panel = tuple[str, str]
"""(data, setting)."""

CONTROLS = ("noise", "real")
REFERENCE = "random"
MARKERS = "os^"


def panels(lines: list[Line]) -> dict[Panel, list[Line]]:
    """Lines by data set and setting."""
    found: dict[Panel, list[Line]] = {}
    for line in lines:
        found.setdefault((line["data"], line["setting"]), []).append(line)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "one", item[0][1])))


def methods_of(lines: list[Line]) -> list[str]:
    """Names in order of first appearance, controls last."""
    return sorted(dict.fromkeys(line["method"] for line in lines), key=lambda name: name in CONTROLS)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def points(lines: list[Line], method: str, budget: int) -> list[Line]:
    """One line per seed."""
    return [line for line in lines if line["method"] == method and line["iterations"] == budget]


def over_reference(lines: list[Line], method: str) -> list[float]:
    """Differences in points to the reference, seed by seed and budget by budget."""
    found = []
    for line in lines:
        if line["method"] == method:
            others = [x for x in points(lines, REFERENCE, line["iterations"]) if x["seed"] == line["seed"]]
            found += [100 * (line["student_test_accuracy"] - each["student_test_accuracy"]) for each in others]
    return found


def table_of(lines: list[Line], panel: Panel) -> Table:
    """Accuracy (and seconds) by method and budget, and the paired difference to random."""
    budgets = sorted({line["iterations"] for line in lines} - {0})
    seeds = sorted({line["seed"] for line in lines})
    table = Table(title=f"{panel[0]}, {panel[1]}: student test accuracy in % (inversion seconds), seeds {seeds}")
    for heading in ("method", *(f"{budget} iterations" for budget in budgets), f"over {REFERENCE}", "wins"):
        table.add_column(heading)
    for method in methods_of(lines):
        if method in CONTROLS:
            table.add_row(method, cell(points(lines, method, 0)))
            continue
        cells = [cell(points(lines, method, budget)) for budget in budgets]
        gains = over_reference(lines, method) if method != REFERENCE else []
        wins = f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else ""
        table.add_row(method, *cells, f"{statistics.fmean(gains):+.1f}" if gains else "", wins)
    return table


def cell(here: list[Line]) -> str:
    """Accuracy in % over the seeds, and seconds where there was an inversion."""
    if not here:
        return ""
    accuracy = spread([100 * line["student_test_accuracy"] for line in here])
    seconds = statistics.fmean(line["inversion_seconds"] for line in here)
    return f"{accuracy} ({seconds:.1f} s)" if seconds else accuracy


def markdown(lines: list[Line]) -> str:
    """One table of all methods: a column for each data set, setting and budget."""
    found = panels(lines)
    columns = [
        (panel, budget) for panel, own in found.items() for budget in sorted({x["iterations"] for x in own} - {0})
    ]
    headings = [f"{data}, {setting}, {budget} iterations" for (data, setting), budget in columns]
    rows = [["method", *headings, f"over {REFERENCE} (wins)"]]
    rows.append(["---"] * len(rows[0]))
    for method in methods_of(lines):
        budgets = [0 if method in CONTROLS else budget for _, budget in columns]
        cells = [
            cell(points(found[panel], method, budget)) for (panel, _), budget in zip(columns, budgets, strict=True)
        ]
        gains = [gain for own in found.values() for gain in over_reference(own, method)]
        wins = sum(gain > 0 for gain in gains)
        won = f"{statistics.fmean(gains):+.1f} ({wins} of {len(gains)})" if gains and method != REFERENCE else ""
        rows.append([method, *cells, won])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def print_tables(lines: list[Line], console: Console | None = None) -> None:
    """One table per data set and setting."""
    console = console or Console(width=140)
    for panel, own in panels(lines).items():
        console.print(table_of(own, panel))


def draw(lines: list[Line], path: Path) -> None:
    """Student accuracy against inversion seconds, mean over the seeds with its spread; a panel per data and setting."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = panels(lines)
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(7.5 * columns, 4.8 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = [name for name in methods_of(lines) if name not in CONTROLS]
    styles = {name: (colormaps["tab10"](i % 10), MARKERS[i // 10 % len(MARKERS)]) for i, name in enumerate(names)}
    for axis, (panel, own) in zip(axes, found.items(), strict=False):
        draw_panel(axis, own, styles)
        seeds = sorted({line["seed"] for line in own})
        axis.set(title=f"{panel[0]}, {panel[1]} teacher{'s' if panel[1] != 'one' else ''}, seeds {seeds}",
                 xlabel="inversion seconds, all teachers", ylabel="student test accuracy in %")  # fmt: skip
    for axis in axes[len(found) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def draw_panel(axis: Any, lines: list[Line], styles: dict[str, tuple[Any, str]]) -> None:
    """One panel's curves."""
    for name in methods_of(lines):
        budgets = sorted({line["iterations"] for line in lines if line["method"] == name})
        own = [points(lines, name, budget) for budget in budgets]
        means = [100 * statistics.fmean(x["student_test_accuracy"] for x in each) for each in own]
        if name == "noise":  # far below: a line there would press all others together
            axis.text(0.99, 0.02, f"noise: {means[0]:.0f} %", transform=axis.transAxes, ha="right", fontsize=9)
            continue
        if name == "real":
            axis.axhline(means[0], color="black", linestyle="--", linewidth=1, label="the clients' own images")
            continue
        seconds = [statistics.fmean(x["inversion_seconds"] for x in each) for each in own]
        spreads = [
            100 * statistics.stdev(x["student_test_accuracy"] for x in each) if len(each) > 1 else 0 for each in own
        ]
        axis.errorbar(
            seconds, means, yerr=spreads, marker=styles[name][1], markersize=5, capsize=2, elinewidth=0.6,
            color=styles[name][0], linewidth=2.2 if name in ("dense", REFERENCE) else 1.2, label=name,
        )  # fmt: skip
    axis.grid(alpha=0.3)
