"""Tables and the picture of `simulations.methods`, from its JSON lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from simulations.runner import Line, Lines, Table, seeds_of

Panel = tuple[str, str]
"""(data, setting)."""

CONTROLS = ("noise", "real")
"""Images without an inversion: uniform noise, and the clients' own, which a federation never has."""

REFERENCE = "random"
MARKERS = "os^"


def panels(lines: Lines) -> dict[Panel, list[Line]]:
    """Lines by data set and setting."""
    found: dict[Panel, list[Line]] = {}
    for line in lines:
        found.setdefault((line.get("data", "the same clients"), line.get("setting", "all")), []).append(line)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "one", item[0][1])))


def methods_of(lines: Lines) -> list[str]:
    """Names in order of first appearance, controls last."""
    return sorted(dict.fromkeys(line["method"] for line in lines), key=lambda name: name in CONTROLS)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def points(lines: Lines, method: str, budget: int) -> list[Line]:
    """One line per seed."""
    return [line for line in lines if line["method"] == method and line["iterations"] == budget]


def over_reference(lines: Lines) -> dict[str, list[float]]:
    """Of each method the differences in points to the reference, over the cells that every method has.

    Only such means can be set beside each other: some cells are easier than others. Of a cell that was measured twice
    the last counts.
    """
    found: dict[str, dict[tuple[Any, ...], float]] = {}
    for line in lines:
        if line["method"] not in CONTROLS:
            cell = (line["data"], line["setting"], line["iterations"], line["seed"])
            found.setdefault(line["method"], {})[cell] = 100 * line["student_test_accuracy"]
    reference = found.pop(REFERENCE, {})
    common = sorted(set(reference).intersection(*found.values()))
    return {method: [own[cell] - reference[cell] for cell in common] for method, own in found.items()}


def won(gains: list[float]) -> str:
    """The mean gain in points, and how many of them are gains."""
    return f"{statistics.fmean(gains):+.1f} ({sum(gain > 0 for gain in gains)} of {len(gains)})" if gains else ""


def cell(here: Lines) -> str:
    """Accuracy in % over the seeds, and seconds where there was an inversion."""
    if not here:
        return ""
    accuracy = spread([100 * line["student_test_accuracy"] for line in here])
    seconds = statistics.fmean(line["inversion_seconds"] for line in here)
    return f"{accuracy} ({seconds:.1f} s)" if seconds else accuracy


def table(lines: Lines) -> list[Table]:
    """All methods in one table: a column for each data set, setting and budget."""
    found, gains = panels(lines), over_reference(lines)
    budgets = {panel: sorted({line["iterations"] for line in own} - {0}) or [0] for panel, own in found.items()}
    columns = [(panel, budget) for panel, own in budgets.items() for budget in own]
    headings = [f"{data}, {setting}, {budget} iterations" for (data, setting), budget in columns]
    rows = [["method", *headings, f"over {REFERENCE} in cells that all have (wins)"]]
    for method in methods_of(lines):
        cells = [cell(points(found[panel], method, 0 if method in CONTROLS else budget)) for panel, budget in columns]
        rows.append([method, *cells, won(gains.get(method, []))])
    return [Table(f"student test accuracy in % (inversion seconds), seeds {seeds_of(lines)}", rows)]


def figure(lines: Lines, targets: Sequence[float] = ()) -> Any:
    """Student accuracy against inversion seconds, mean over the seeds with its spread; a panel per data and setting.

    Args:
        lines: measured; those of `simulations.compare` are one panel.
        targets: accuracies in [0, 1] to mark.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = panels(lines)
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    drawn = Figure(figsize=(7.5 * columns, 4.8 * rows + 1.2), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    names = [name for name in methods_of(lines) if name not in CONTROLS]
    styles = {name: (colormaps["tab10"](i % 10), MARKERS[i // 10 % len(MARKERS)]) for i, name in enumerate(names)}
    for axis, (panel, own) in zip(axes, found.items(), strict=False):
        draw_panel(axis, own, styles)
        for target in targets:
            axis.axhline(100 * target, color="black", linewidth=0.5, linestyle=":")
        axis.set(title=f"{panel[0]}, {panel[1]} teacher{'s' if panel[1] != 'one' else ''}, seeds {seeds_of(own)}",
                 xlabel="inversion seconds, all teachers", ylabel="student test accuracy in %")  # fmt: skip
    for axis in axes[len(found) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    return drawn


def draw_panel(axis: Any, lines: Lines, styles: dict[str, tuple[Any, str]]) -> None:
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
