"""How many patches may stop, and when? `python -m simulations.schedule [--data digits shapes] [--seeds 0 1 2]`.

One stop of each ratio at each timing, on the same trained clients, random patches, dense beside
them. Accuracy, seconds and FLOPs; and how sure of an image's class its own teacher is, and the
*other* clients together: what these do not see in it was lost. The picture has the same images at
rising sparsity.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simulations.convergence import SHAPES, SMOKE
from simulations.local_clients import check_clients
from simulations.methods import clients_on, invert_all, taught
from simulations.methods.report import spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.config import Settings
from smi_fed.inversion import SparseImages
from smi_fed.pipeline import TrainedTeacher
from smi_fed.training import predict

CLIENTS, ITERATIONS, IMAGES = 4, 20, 100
DATA = {"digits": (), "shapes": SHAPES}
RATIOS = (0.1, 0.3, 0.5, 0.77, 0.9)
TIMINGS = {"early": 5, "middle": 10, "late": 15}
SHOWN = (0.0, 0.5, 0.77, 0.9)
"""Sparsities whose images are drawn, stopped early."""


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Dense, and each ratio at each timing."""
    stops = [(0.0, "never"), *((ratio, timing) for ratio in options.ratios for timing in TIMINGS)]
    return [
        Cell(
            {"data": data, "ratio": ratio, "timing": timing, "iterations": ITERATIONS, "smoke": options.smoke},
            (f"server.images_per_teacher={IMAGES}", f"inversion.iterations={ITERATIONS}", "inversion.selection=random",
             f"inversion.schedule='{f'{TIMINGS[timing]}:{ratio}' if ratio else ''}'",
             *(SMOKE if options.smoke else ())),
            DATA[data],
        )
        for data in options.data
        for ratio, timing in stops
    ]  # fmt: skip


def measure(settings: Settings, cell: Cell) -> Line:
    """One student, and what teachers see in the images."""
    teachers = clients_on(settings, cell, CLIENTS)
    found, inverted = invert_all(settings, teachers, cell["iterations"], 1, cell.device)
    own, others = certainty(teachers, found)
    line = {**inverted, **taught(settings, cell, teachers, found), "own_certainty": own, "others_certainty": others}
    if cell["ratio"] in SHOWN and cell["timing"] in ("never", "early"):
        line["pictures"] = _pictures(found[0])
    return line


@torch.no_grad()
def certainty(teachers: Sequence[TrainedTeacher], found: Sequence[SparseImages]) -> tuple[float, float]:
    """Mean probability of an image's class: by the teacher it was made from, and by the mean of the others.

    Only others that have seen the class are asked; images of a class that no other has seen do not count there.
    """
    own, others = list[Tensor](), list[Tensor]()
    for number, images in enumerate(found):
        said = torch.stack([predict(each.model, images.images).softmax(1) for each in teachers])
        of_class = said[:, torch.arange(len(images)), images.targets]
        seen = torch.tensor([each.label_counts for each in teachers])[:, images.targets] > 0
        own.append(of_class[number])
        seen[number] = False
        known = seen.any(0)
        others.append(((of_class * seen).sum(0) / seen.sum(0).clamp(min=1))[known])
    return float(torch.cat(own).mean()), float(torch.cat(others).mean())


def _pictures(images: SparseImages, most: int = 6) -> Any:
    """A few images of different classes as grey levels or colours in 0..255, and the patches that were kept."""
    rows = [int((images.targets == each).nonzero()[0]) for each in images.targets.unique()[:most]]
    pixels = (images.images[rows] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return {"pixels": pixels.tolist(), "mask": images.mask[rows].int().tolist()}


def table(lines: Lines) -> list[Table]:
    """A table for each kind of data."""
    found = []
    for data in dict.fromkeys(line["data"] for line in lines):
        own = [line for line in lines if line["data"] == data]
        rows = [["stopped", "when", "accuracy, %", "seconds", "FLOPs of dense", "sure: own teacher", "others"]]
        dense = [line for line in own if not line["ratio"]]
        for ratio, timing in dict.fromkeys((line["ratio"], line["timing"]) for line in own):
            rows.append(_row([x for x in own if (x["ratio"], x["timing"]) == (ratio, timing)], dense))
        found.append(Table(f"{data}, seeds {seeds_of(own)}, {CLIENTS} clients, {ITERATIONS} iterations", rows))
    return found


def _row(here: Lines, dense: Lines) -> list[str]:
    mean = lambda lines, key: statistics.fmean(line[key] for line in lines)  # noqa: E731
    return [
        f"{here[0]['ratio']:.0%}", here[0]["timing"], spread([100 * line["student_test_accuracy"] for line in here]),
        f"{mean(here, 'inversion_seconds'):.1f}", f"{mean(here, 'flops') / mean(dense, 'flops'):.2f}" if dense else "",
        f"{mean(here, 'own_certainty'):.2f}", f"{mean(here, 'others_certainty'):.2f}",
    ]  # fmt: skip


def figure(lines: Lines) -> Any:
    """The first seed's images at rising sparsity: a row for each, the patches that were kept below it."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if "pictures" in line and line["seed"] == lines[0]["seed"]]
    data = list(dict.fromkeys(line["data"] for line in shown)) or ["nothing"]
    height = 2 * max([sum(line["data"] == each for line in shown) for each in data], default=1)
    drawn = Figure(figsize=(5.2 * len(data), 0.85 * max(height, 1) + 0.4), layout="constrained")
    for place, name in zip(drawn.subfigures(1, len(data), squeeze=False)[0], data, strict=True):
        own = sorted((line for line in shown if line["data"] == name), key=lambda line: line["ratio"])
        place.suptitle(name)
        _rows(place, own)
    return drawn


def _rows(place: Any, lines: Lines) -> None:
    if not lines:
        return
    columns = len(lines[0]["pictures"]["pixels"])
    axes = place.subplots(2 * len(lines), columns, squeeze=False)
    for row, line in enumerate(lines):
        for column, (pixels, mask) in enumerate(zip(*line["pictures"].values(), strict=True)):
            image = torch.tensor(pixels, dtype=torch.uint8)
            axes[2 * row][column].imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            axes[2 * row + 1][column].imshow(mask, cmap="Greens", vmin=0, vmax=1)
        axes[2 * row][0].set_ylabel(f"{line['ratio']:.0%}", rotation=0, labelpad=14, va="center")
        axes[2 * row + 1][0].set_ylabel("kept", rotation=0, labelpad=14, va="center", fontsize=7)
    for axis in axes.flatten():
        axis.set(xticks=[], yticks=[])


STUDY = Study(
    name="schedule", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="schedule.png",
    words=("experiment=convergence",), options=add_options, check=check_clients, in_turn="ratio",
    page=Page("docs/study.md", note=lambda _: ": seconds of the process, on one thread, all clients.", markdown=True),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
