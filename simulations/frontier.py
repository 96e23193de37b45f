"""Tables and the picture of `simulations.convergence`: what each method reaches for how many seconds."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from simulations.methods.report import CONTROLS, methods_of, spread
from simulations.runner import Line, Lines, Table, seeds_of
from simulations.runner.study import shared_changes

Target = Callable[[Line], float]

TARGETS: dict[str, Target] = {f"{each:.0%}": lambda _, each=each: each for each in (0.80, 0.85, 0.88)}
BELOW: dict[str, Target] = {
    f"ensemble less {points}": lambda line, points=points: line["ensemble_test_accuracy"] - points / 100
    for points in (10, 5, 3)
}
"""Accuracies to reach, where real pictures allow less than 80 %."""
DENSE = "dense"


def inversion_seconds(line: Line) -> float:
    """What the inversion of all clients took."""
    return float(line["inversion_seconds"])


def server_seconds(line: Line) -> float:
    """What inversion and distillation took."""
    return float(line["inversion_seconds"] + line["distillation_seconds"])


def seconds_to(lines: Lines, target: Target, seconds: Callable[[Line], float]) -> float | None:
    """Of one method and seed the seconds of the cheapest setting that reaches `target` and holds it.

    It holds where every setting with no fewer iterations and no fewer images reaches it too: luck does not count.
    """
    good = [line for line in lines if line["student_test_accuracy"] >= target(line)]
    held = [line for line in good if all(above in good for above in lines if _is_more(above, line))]
    return min(map(seconds, held), default=None)


def _is_more(one: Line, other: Line) -> bool:
    return all(one[key] >= other[key] for key in ("iterations", "images_per_client"))


def _budget(line: Line) -> tuple[int, int]:
    return line["images_per_client"], line["iterations"]


def table(lines: Lines) -> list[Table]:
    """Of each condition every setting's accuracy, and seconds to each target; then the rates that were tried."""
    found = []
    for condition in dict.fromkeys(line["condition"] for line in lines):
        own = [line for line in lines if line["condition"] == condition]
        title = f"{condition}, seeds {seeds_of(own)}"
        if is_tuning(condition):
            found.append(_rates(title, own))
            continue
        found += [_settings(title, own), _targets(title, own)]
    return found


def _settings(title: str, lines: Lines) -> Table:
    budgets = sorted({_budget(line) for line in lines if line["iterations"]})
    rows = [["method", *(f"{images} x {iterations}" for images, iterations in budgets)]]
    for method in methods_of(lines):
        row = [method]
        for images, iterations in budgets:
            at = iterations if method not in CONTROLS else 0
            here = [x for x in lines if (x["method"], *_budget(x)) == (method, images, at)]
            row.append(_cell(here))
        rows.append(row)
    return Table(f"{title}: accuracy in % (inversion seconds) by images a client x iterations", rows)


def _cell(here: Lines) -> str:
    if not here:
        return ""
    seconds = statistics.fmean(map(inversion_seconds, here))
    accuracy = spread([100 * line["student_test_accuracy"] for line in here])
    return f"{accuracy} ({seconds:.1f})" if seconds else accuracy


def is_tuning(condition: str) -> bool:
    """Whether learning rates were tried."""
    return condition.startswith("tuning")


def _targets(title: str, lines: Lines) -> Table:
    targets = BELOW if lines[0]["condition"] == "real" else TARGETS
    rows = [["method", *(f"{target}, {what}" for target in targets for what in ("inversion", "server"))]]
    for method in methods_of(lines):
        if method in CONTROLS:
            continue
        row = [method]
        for target in targets.values():
            row += [_ratio(lines, method, target, seconds) for seconds in (inversion_seconds, server_seconds)]
        rows.append(row)
    return Table(f"{title}: seconds to, and the cheapest dense over it; medians over the seeds that reach it", rows)


def _ratio(lines: Lines, method: str, target: Target, seconds: Callable[[Line], float]) -> str:
    took: list[float] = []
    times: list[float] = []
    seeds = seeds_of(lines)
    for seed in seeds:
        own, dense = (
            seconds_to([x for x in lines if (x["method"], x["seed"]) == (name, seed)], target, seconds)
            for name in (method, DENSE)
        )
        took += [own] if own is not None else []
        times += [dense / own] if own is not None and dense is not None else []
    if not took:
        return "never"
    ratio = f", {statistics.median(times):.2f}" if times else ""
    few = f" ({len(took)} of {len(seeds)})" if len(took) < len(seeds) else ""
    return f"{statistics.median(took):.1f}{ratio}{few}"


def _rates(title: str, lines: Lines) -> Table:
    rates = sorted({line["learning_rate"] for line in lines})
    rows = [["method", *map(str, rates)]]
    for method in methods_of(lines):
        own = {line["learning_rate"]: 100 * line["student_test_accuracy"] for line in lines if line["method"] == method}
        rows.append([method, *(f"{own[rate]:.1f}" if rate in own else "" for rate in rates)])
    return Table(f"{title}: accuracy in % by learning rate", rows)


def arguments(lines: Lines) -> str:
    """What was asked for, as far as lines tell."""
    conditions = dict.fromkeys(line["condition"] for line in lines)
    seeds = seeds_of([line for line in lines if not is_tuning(line["condition"])])
    return shlex.join(["--conditions", *conditions, "--seeds", *map(str, seeds), *shared_changes(lines)])


def figure(lines: Lines) -> Any:
    """Of each condition the mean accuracy of every setting over both kinds of seconds, with each method's frontier."""
    from matplotlib.figure import Figure

    lines = [line for line in lines if not is_tuning(line["condition"])]
    every = list(dict.fromkeys(line["condition"] for line in lines))
    wide = [
        each for each in every if len({_budget(x) for x in lines if x["condition"] == each and x["iterations"]}) > 1
    ]
    conditions = wide or every or ["nothing"]  # a single setting is no frontier
    drawn = Figure(figsize=(13, 4.6 * len(conditions) + 0.6), layout="constrained")
    axes = drawn.subplots(len(conditions), 2, squeeze=False)
    for row, condition in zip(axes, conditions, strict=True):
        own = [line for line in lines if line["condition"] == condition]
        for axis, (what, seconds) in zip(
            row, (("inversion", inversion_seconds), ("server", server_seconds)), strict=True
        ):
            _panel(axis, own, seconds, methods_of(lines))
            scale = "log" if what == "inversion" else "linear"
            axis.set(title=f"{condition}, seeds {seeds_of(own)}", xlabel=f"{what} seconds, all clients", xscale=scale,
                     ylabel="student test accuracy in %")  # fmt: skip
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=9)
    return drawn


def _panel(axis: Any, lines: Lines, seconds: Callable[[Line], float], methods: Sequence[str]) -> None:
    """A colour for each of `methods`, the same in every panel; the clients' own images at their best."""
    for place, method in enumerate(methods):
        points = sorted(_means([line for line in lines if line["method"] == method], seconds))
        if not points:
            continue
        if method in CONTROLS:
            if method == "real":
                axis.axhline(
                    max(accuracy for _, accuracy in points),
                    color="black",
                    linestyle="--",
                    linewidth=1,
                    label="the clients' own images",
                )
            continue
        colour = f"C{place}"
        axis.plot(*zip(*points, strict=True), "os^Dv<>"[place % 7], color=colour, markersize=5)
        best = list(accumulate((accuracy for _, accuracy in points), max))
        axis.step([x for x, _ in points], best, where="post", color=colour, label=method,
                  linewidth=2.2 if method == DENSE else 1.2)  # fmt: skip
    axis.grid(alpha=0.3)


def _means(lines: Lines, seconds: Callable[[Line], float]) -> Sequence[tuple[float, float]]:
    """(seconds, accuracy in %) of each setting, mean over the seeds."""
    groups = [[x for x in lines if _budget(x) == each] for each in dict.fromkeys(map(_budget, lines))]
    return [
        (statistics.fmean(map(seconds, each)), 100 * statistics.fmean(x["student_test_accuracy"] for x in each))
        for each in groups
    ]
