"""The table and the picture of `simulations.owners`, from its JSON lines."""

from __future__ import annotations

import statistics
from typing import Any

from simulations.methods.report import spread
from simulations.runner import Line, Lines, Table, seeds_of

Panel = tuple[str, str]
"""(skew, federation)."""

SKEWS = {"styles": "a style each", "classes": "skewed classes"}
FEDERATIONS = {"equal": "one architecture", "mixed": "four architectures"}


def mean(accuracy: dict[str, float]) -> float:
    """Over the styles, in %."""
    return 100 * statistics.fmean(accuracy.values())


def rows_of(lines: Lines) -> dict[str, dict[Panel, dict[int, float]]]:
    """Mean accuracy in % by what it is of, by panel and by seed; of the owners alone the best one and their mean."""
    found: dict[str, dict[Panel, dict[int, float]]] = {}
    for line in lines:
        for name, value in _values(line):
            found.setdefault(name, {}).setdefault((line["skew"], line["federation"]), {})[line["seed"]] = value
    return found


def _values(line: Line) -> list[tuple[str, float]]:
    if line["method"] == "alone":
        each = [mean(accuracy) for accuracy in line["accuracy"]]
        return [("best owner alone", max(each)), ("owners alone, mean", statistics.fmean(each))]
    found = [(line["method"], mean(line["accuracy"]))]
    if "finished_accuracy" in line:
        found.append((f"{line['method']}, then class statistics", mean(line["finished_accuracy"])))
    return found


def panels(lines: Lines) -> list[Panel]:
    """Those that occur, in the order of the study."""
    return [(s, f) for s in SKEWS for f in FEDERATIONS if any((x["skew"], x["federation"]) == (s, f) for x in lines)]


def table(lines: Lines) -> list[Table]:
    """Every method in every panel."""
    columns = panels(lines)
    heads = [f"{SKEWS[skew]}, {FEDERATIONS[federation]}" for skew, federation in columns]
    rows = [["what", *heads]]
    for name, found in rows_of(lines).items():
        rows.append([name, *(_cell(found.get(panel, {})) for panel in columns)])
    return [Table(f"mean accuracy over the styles in %, seeds {seeds_of(lines)}", rows)]


def _cell(by_seed: dict[int, float]) -> str:
    if not by_seed:
        return ""
    return spread(list(by_seed.values())) + ("" if len(by_seed) > 1 else f" (seed {min(by_seed)})")


def figure(lines: Lines) -> Any:
    """A bar for each method, its seeds as points; a panel for each skew and federation."""
    from matplotlib.figure import Figure

    columns, found = panels(lines), rows_of(lines)
    drawn = Figure(figsize=(5.2 * len(columns) + 2, 0.36 * len(found) + 1.6), layout="constrained")
    axes = drawn.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    names = list(found)
    for axis, panel in zip(axes, columns, strict=True):
        for place, name in enumerate(names):
            values = list(found[name].get(panel, {}).values())
            if values:
                colour = "tab:blue" if name.startswith("student") else "tab:gray"
                axis.barh(place, statistics.fmean(values), color=colour, alpha=0.7)
                axis.plot(values, [place] * len(values), "k.", markersize=4)
                axis.text(max(values) + 1, place, f"{statistics.fmean(values):.1f}", va="center", fontsize=8)
        axis.set(title=f"{SKEWS[panel[0]]}, {FEDERATIONS[panel[1]]}", xlabel="mean accuracy over the styles in %")
        axis.set_xlim(0, 100)
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return drawn
