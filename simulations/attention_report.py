"""What the study of attention tells: a table and a picture of each data set."""

from __future__ import annotations

import statistics
from typing import Any

from simulations.methods.report import CONTROLS, spread
from simulations.runner import Lines, Table, groups, seeds_of
from simulations.sources import by_data


def table(lines: Lines) -> list[Table]:
    """Of each data set a row of each teacher and choice; IoU and pointing are on the data's own images."""
    return [_table(data, own) for data, own in by_data(lines).items()]


def _table(data: str, lines: Lines) -> Table:
    rows = [["teacher", "patches chosen by", "IoU with the mask, %", "pointing, %", "IoU in synthetic images, %",
             "student accuracy, %", "inversion seconds"]]  # fmt: skip
    for own in groups(lines, "teacher", "choice").values():
        looks = [spread(percent(own, key)) if key in own[0] else "" for key in ("iou", "pointing", "synthetic_iou")]
        took = [line["inversion_seconds"] for line in own if "inversion_seconds" in line]
        seconds = f"{statistics.fmean(took):.1f}" if took else ""
        rows.append(
            [own[0]["teacher"], own[0]["choice"], *looks, spread(percent(own, "student_test_accuracy")), seconds]
        )
    return Table(f"{data}, seeds {seeds_of(lines)}", rows, [*_bounds(lines), _teachers(lines)])


def percent(lines: Lines, key: str) -> list[float]:
    """Values of lines in %."""
    return [100 * line[key] for line in lines]


def _bounds(lines: Lines) -> list[str]:
    looks = [line for line in lines if "iou" in line]
    if not looks:
        return []
    keys = ("iou_by_chance", "pointing_by_chance", "iou_of_masks")
    chance, pointed, most = (statistics.fmean(percent(looks, key)) for key in keys)
    return [
        f"By chance IoU is {chance:.1f} % and pointing {pointed:.1f} %; as many patches that the mask itself chooses "
        f"have an IoU of {most:.1f} %."
    ]


def _teachers(lines: Lines) -> str:
    said = []
    for teacher in dict.fromkeys(line["teacher"] for line in lines):
        by_seed = {x["seed"]: 100 * x["ensemble_test_accuracy"] for x in lines if x["teacher"] == teacher}
        said.append(f"{teacher} {spread(list(by_seed.values()))} %")
    return f"The teachers' own accuracy: {', '.join(said)}."


def figure(lines: Lines) -> Any:
    """Of each data set student accuracy over IoU, a point for each teacher and choice; dense is a line."""
    from matplotlib.figure import Figure

    kinds = by_data(lines)
    drawn = Figure(figsize=(8 * len(kinds), 5), layout="constrained")
    for axis, (data, own) in zip(drawn.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        _draw(axis, own)
        axis.set(xlabel="IoU of the patches that are kept with the mask, the data's own images, %",
                 ylabel="student test accuracy in %", title=f"{data}, seeds {seeds_of(own)}")  # fmt: skip
        axis.margins(x=0.12)  # room for names
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return drawn


def _draw(axis: Any, lines: Lines) -> None:
    first = lines[0]["teacher"]
    for own in groups(lines, "teacher", "choice").values():
        colour = "tab:blue" if own[0]["teacher"] == first else "tab:orange"
        mean, deviation = _moments(percent(own, "student_test_accuracy"))
        if "iou" not in own[0]:
            choice, shade = own[0]["choice"], "black" if own[0]["choice"] in CONTROLS else colour
            style = {"noise": ":", "real": "-."}.get(choice, "--")
            axis.axhline(mean, color=shade, linestyle=style, linewidth=1, label=f"{own[0]['teacher']}: {choice}")
            continue
        place, wide = _moments(percent(own, "iou"))
        axis.errorbar(place, mean, deviation, wide, marker="o", color=colour, capsize=2, elinewidth=0.6)
        below = 4 if own[0]["teacher"] == first else -12
        axis.annotate(own[0]["choice"], (place, mean), xytext=(4, below), textcoords="offset points", fontsize=8)
    if chance := [100 * line["iou_by_chance"] for line in lines if "iou_by_chance" in line]:
        axis.axvline(statistics.fmean(chance), color="black", linewidth=0.6, label="IoU by chance")


def _moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
