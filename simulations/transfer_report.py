"""The table and the picture of `simulations.transfer`, from its JSON lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from simulations.methods.report import spread
from simulations.runner import Line, Lines, Table, groups, seeds_of
from smi_fed.convergence import reaches

DENSE = "dense"
SHARE = 0.9
"""Of an end, what counts as having converged."""

STEPS, SECONDS, ACCURACY = range(3)
COLOURS = {"dense": "tab:red", "sparse": "tab:blue", "rebirth": "tab:green", "noise": "tab:gray", "real": "black"}


def reached(line: Line, end: float) -> tuple[float, float] | None:
    """Steps and seconds after which a student stays above `SHARE` of `end`; None without that or without a gain."""
    if line["curve"][-1][ACCURACY] <= line["curve"][0][ACCURACY]:
        return None
    values = [point[ACCURACY] for point in line["curve"]]
    steps = reaches(values, [point[STEPS] for point in line["curve"]], SHARE * end)
    return None if steps is None else (steps, next(p[SECONDS] for p in line["curve"] if p[STEPS] == steps))


def table(lines: Lines) -> list[Table]:
    """Each source by each budget, of each kind of student."""
    share = f"{SHARE:.0%}".replace("%", " %")
    rows = [["data", "student", "images from", "equal", "images", "inversion, s", "accuracy at the end, %",
             f"steps to {share} of it (s)", f"to {share} of dense's (s)"]]  # fmt: skip
    ends = {(x["data"], x["protocol"], x["seed"]): _end(x) for x in lines if x["source"] == DENSE}
    for own in groups(lines, "data", "protocol").values():
        for names, here in groups(own, "source", "budget").items():
            dense = [ends.get((line["data"], line["protocol"], line["seed"])) for line in here]
            rows.append([
                here[0]["data"], here[0]["protocol"], *names, f"{_mean(here, 'images'):.0f}",
                f"{_mean(here, 'inversion_seconds'):.2f}", spread([100 * _end(line) for line in here]),
                _cost([reached(line, _end(line)) for line in here]),
                _cost([reached(line, end) for line, end in zip(here, dense, strict=True) if end is not None]),
            ])  # fmt: skip
    return [Table(f"students of one teacher, seeds {seeds_of(lines)}", rows, [_teachers(lines)])]


def _teachers(lines: Lines) -> str:
    found = []
    for (data,), own in groups(lines, "data").items():
        by_seed = {line["seed"]: 100 * line["teacher_test_accuracy"] for line in own}
        found.append(f"{data} {spread(list(by_seed.values()))} %")
    return f"The teachers' own accuracy: {', '.join(found)}."


def _end(line: Line) -> float:
    return float(line["student_test_accuracy"])


def _mean(lines: Lines, key: str) -> float:
    return statistics.fmean(line[key] for line in lines)


def _cost(found: Sequence[tuple[float, float] | None]) -> str:
    """Steps, their spread and seconds over the seeds that get there, and how many do where not all."""
    there = [each for each in found if each is not None]
    if not there:
        return "never" if found else ""
    some = f", {len(there)} of {len(found)}" if len(there) < len(found) else ""
    return f"{spread([steps for steps, _ in there])} ({statistics.fmean(seconds for _, seconds in there):.2f}{some})"


def note(_: Lines) -> str:
    """What stands behind the command on the page: how to read the table."""
    return (
        ": mean ± standard deviation over the seeds; seconds to a share are those of the distillation alone, and on a "
        "CPU those of the process."
    )


def figure(lines: Lines) -> Any:
    """Accuracy over steps, and over seconds of inversion and distillation; a row for each kind of student."""
    from matplotlib.figure import Figure

    panels = groups(lines, "data", "protocol")
    drawn = Figure(figsize=(12, 3.6 * len(panels) + 0.6), layout="constrained")
    axes = drawn.subplots(len(panels), 2, squeeze=False)
    for row, ((data, protocol), own) in zip(axes, panels.items(), strict=True):
        for (source, budget), here in groups(own, "source", "budget").items():
            steps, seconds, accuracy = mean_curve(here)
            begin = _mean(here, "inversion_seconds")
            style = {"color": COLOURS[source], "linestyle": "-" if budget == "images" else "--"}
            row[0].plot(steps, accuracy, label=f"{source}, equal {budget}", **style)
            row[1].plot([begin + each for each in seconds], accuracy, **style)
        row[0].set(title=f"{data}, {protocol}, seeds {seeds_of(own)}", xlabel="steps of the student",
                   ylabel="student test accuracy in %")  # fmt: skip
        row[1].set(xlabel="seconds of inversion and distillation")
        for axis in row:
            axis.grid(alpha=0.3)
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return drawn


def mean_curve(lines: Lines) -> tuple[list[int], list[float], list[float]]:
    """Steps, seconds and accuracy in %, means over lines at the steps that all of them have."""
    curves = [{point[STEPS]: point for point in line["curve"]} for line in lines]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    means = [[statistics.fmean(c[step][axis] for c in curves) for step in steps] for axis in (SECONDS, ACCURACY)]
    return steps, means[0], [100 * each for each in means[1]]
