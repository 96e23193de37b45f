"""How good must attention be? `python -m simulations.attention [--teachers supervised registers] [--seeds 0 1 2]`.

One teacher of five shapes (conf/model/outlines.yaml), whose true masks are known. Which patches go on when
most stop is chosen by its attention, by its attention under noise, at random, by an oracle and by the
oracle's opposite. How well a choice finds the object is measured on held-out images: IoU of the patches
that are kept with the true mask, and how often the first of them lies in it (the pointing game). Beside it
stands what a student learns from images that were inverted with this choice, from dense ones, from noise
and from the teacher's own images. A teacher with registers is another one, with images of its own.

No synthetic image has a true mask. So the oracle is a linear readout of the teacher's patch tokens, fitted
to the true masks of the training images; it says too where the object is in finished synthetic images.
A self-distilled teacher is left out: a thousand images of 32 pixels are too few for one worth the name.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simulations.convergence import SMOKE
from simulations.latest import Latest
from simulations.local_clients import check_clients
from simulations.masks import coverage, iou, kept, pointing
from simulations.methods import clients_on, control, invert_all, taught
from simulations.methods.report import CONTROLS, spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.sources import ITERATIONS, ONE_TEACHER, RATE, STOP, note
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages, randomness
from smi_fed.inversion.selections import SELECTIONS, Candidates, Selection
from smi_fed.inversion.teacher import Teacher, View, adapt
from smi_fed.models import Classifier
from smi_fed.tokens import to_patches

IMAGES = 200
LEVELS, NOISY = (1.0, 3.0), "attention, noise {:g}".format
RIDGE = 1e-3
BATCH = 250
"""Real images that a teacher is shown at once."""

DENSE, OPPOSITE = "dense", "opposite"
TEACHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "supervised": (
        (),
        (*CONTROLS, DENSE, OPPOSITE, "random", *map(NOISY, LEVELS[::-1]), "attention", "oracle"),
    ),
    "registers": (
        ("+model.clients.vit_p4_w64_d2.kwargs.reg_tokens=4",),
        (DENSE, "random", "attention", "oracle"),
    ),
}
"""Of each teacher what it changes, and by what the patches of its images are chosen, or what stands in their place."""


def noisy(candidates: Candidates, level: float) -> Tensor:
    """Scores (b, k): the importance's logarithm, of mean 0 and deviation 1 in each image, plus normal noise.

    Args:
        level: the noise's standard deviation.
    """
    importance = candidates.teacher.importance(candidates.view, candidates.targets).double()
    logs = importance.clamp(min=torch.finfo(torch.float64).tiny).log()
    wide = logs.std(1, keepdim=True).clamp(min=1e-12)
    ids, age = candidates.ids, candidates.age
    noise = randomness.normal(candidates.key, ids, age, randomness.SELECT, importance.shape[1])
    return (logs - logs.mean(1, keepdim=True)) / wide + level * noise


def choices(readout: Tensor) -> dict[str, Selection]:
    """The selections of this study; the oracle reads the object's share of each patch (b, k) in the tokens."""

    def oracle(candidates: Candidates) -> Tensor:
        return read_tokens(candidates.teacher, candidates.view) @ readout

    return {
        **{NOISY(level): partial(noisy, level=level) for level in LEVELS},
        "oracle": oracle,
        OPPOSITE: lambda candidates: -oracle(candidates),
    }


@contextmanager
def known(selections: dict[str, Selection]) -> Iterator[None]:
    """Selections that an inversion finds by their names meanwhile."""
    SELECTIONS.update(selections)
    try:
        yield
    finally:
        for name in selections:
            del SELECTIONS[name]


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--images", type=int, default=IMAGES, help="that each student learns from")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each choice of each teacher."""
    return [
        Cell(
            {"teacher": teacher, "choice": choice, "smoke": options.smoke},
            ("inversion.schedule=''",) if choice == DENSE else (),
            (*changes, f"server.images_per_teacher={options.images}", f"inversion.iterations={ITERATIONS}",
             f"inversion.schedule='{STOP}'", f"inversion.learning_rate={RATE}", "inversion.selection=random",
             *(SMOKE if options.smoke else ())),
        )
        for teacher in options.teachers
        for changes, choices in [TEACHERS[teacher]]
        for choice in choices
    ]  # fmt: skip


def measure(settings: Settings, cell: Cell) -> Line:
    """How well one choice finds the object, and one student."""
    teachers, choice = clients_on(settings, cell, 1), cell["choice"]
    if choice in CONTROLS:
        return taught(settings, cell, teachers, list(control(choice, settings, teachers)))
    model = teachers[0].model
    train, test = (each.of_classes(model.spec.class_names) for each in load_images(settings.data))
    readout = _READOUTS.of(teachers[0].digest, lambda: fitted(model, train))
    with known(choices(readout)):
        if choice != DENSE:
            settings = replace(settings, inversion=replace(settings.inversion, selection=choice))
        (found,), inverted = invert_all(settings, teachers, settings.inversion.iterations, 1, cell.device)
        line = {**inverted, **taught(settings, cell, teachers, [found])}
        if choice == DENSE:
            return line
        count = int(found.mask[0].sum())
        return {**line, **looked(model, test, choice, count), "synthetic_iou": synthetic_iou(model, found)}


_READOUTS = Latest[Tensor]()


def looked(model: Classifier, images: ImageSet, choice: str, count: int) -> Line:
    """How well a choice of `count` patches finds the object of real images, and what is the least and the most."""
    assert images.masks is not None
    covered = coverage(images.masks, adapt(model).patch_size)
    scores, chance = (scored(model, images, each).cpu() for each in (choice, "random"))
    return {
        "iou": iou(kept(scores, count), covered),
        "pointing": pointing(scores, covered),
        "iou_by_chance": iou(kept(chance, count), covered),
        "pointing_by_chance": float((covered >= 0.5).float().mean()),
        "iou_of_masks": iou(kept(covered, count), covered),
    }


@torch.no_grad()
def scored(model: Classifier, images: ImageSet, choice: str) -> Tensor:
    """What a selection says of every patch (n, patches) of whole images."""
    teacher, rows = adapt(model), torch.arange(len(images), device=model.mean.device)
    found = []
    for ids in rows.split(BATCH):
        view, targets = shown(model, teacher, images.images[ids.cpu()]), images.labels[ids.cpu()].to(ids.device)
        found.append(SELECTIONS[choice](Candidates(teacher, view, targets, 0, ids, torch.zeros_like(ids), _no_pull)))
    return torch.cat(found)


def _no_pull() -> Tensor:
    raise NotImplementedError("real images have no objective")


def shown(model: Classifier, teacher: Teacher, images: Tensor) -> View:
    """Whole images (b, c, h, w) in [0, 1], as a teacher sees them."""
    patches = to_patches(model.normalised(images.to(model.mean.device)), teacher.patch_size)
    return View(patches, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1))


def read_tokens(teacher: Teacher, view: View) -> Tensor:
    """A row of features of each patch (b, k, features) float64: its tokens of every layer, and 1."""
    _, layers = teacher.features(view)
    tokens = torch.cat([layer[:, teacher.prefix_tokens :] for layer in layers], dim=2).double()
    return torch.cat([tokens, torch.ones_like(tokens[:, :, :1])], dim=2)


@torch.no_grad()
def fitted(model: Classifier, images: ImageSet) -> Tensor:
    """The ridge regression (features,) of the mask's share of a patch on the patch's tokens."""
    assert images.masks is not None
    teacher = adapt(model)
    covered = coverage(images.masks, teacher.patch_size)
    gram = right = torch.zeros((), dtype=torch.float64, device=model.mean.device)
    for rows in torch.arange(len(images)).split(BATCH):
        features = read_tokens(teacher, shown(model, teacher, images.images[rows])).flatten(0, 1)
        gram = gram + features.T @ features
        right = right + features.T @ covered[rows].flatten().to(features)
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), right)


def synthetic_iou(model: Classifier, found: SparseImages) -> float:
    """IoU of the patches that were kept with the object of the finished images, as the oracle sees it there."""
    images = ImageSet(found.images, found.targets, tuple(map(str, range(model.spec.num_classes))))
    return iou(found.mask.flatten(1), scored(model, images, "oracle").clamp(0, 1).cpu())


def table(lines: Lines) -> list[Table]:
    """A row of each teacher and choice; IoU and pointing are on real images."""
    rows = [["teacher", "patches chosen by", "IoU with the mask, %", "pointing, %", "IoU in synthetic images, %",
             "student accuracy, %", "inversion seconds"]]  # fmt: skip
    for own in groups(lines):
        looks = [spread(percent(own, key)) if key in own[0] else "" for key in ("iou", "pointing", "synthetic_iou")]
        took = [line["inversion_seconds"] for line in own if "inversion_seconds" in line]
        seconds = f"{statistics.fmean(took):.1f}" if took else ""
        rows.append(
            [own[0]["teacher"], own[0]["choice"], *looks, spread(percent(own, "student_test_accuracy")), seconds]
        )
    return [Table(f"attention, seeds {seeds_of(lines)}", rows, [*_bounds(lines), _teachers(lines)])]


def groups(lines: Lines) -> list[list[Line]]:
    """Lines by teacher and choice, a line for each seed."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["teacher"], line["choice"]), []).append(line)
    return list(found.values())


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
    """Student accuracy over IoU, a point for each teacher and choice; dense is a line."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axis = drawn.subplots()
    for own in groups(lines):
        colour = "tab:blue" if own[0]["teacher"] == "supervised" else "tab:orange"
        mean, deviation = _moments(percent(own, "student_test_accuracy"))
        if "iou" not in own[0]:
            choice, shade = own[0]["choice"], "black" if own[0]["choice"] in CONTROLS else colour
            style = {"noise": ":", "real": "-."}.get(choice, "--")
            axis.axhline(mean, color=shade, linestyle=style, linewidth=1, label=f"{own[0]['teacher']}: {choice}")
            continue
        place, wide = _moments(percent(own, "iou"))
        axis.errorbar(place, mean, deviation, wide, marker="o", color=colour, capsize=2, elinewidth=0.6)
        below = -12 if own[0]["teacher"] == "registers" else 4
        axis.annotate(own[0]["choice"], (place, mean), xytext=(4, below), textcoords="offset points", fontsize=8)
    if chance := [100 * line["iou_by_chance"] for line in lines if "iou_by_chance" in line]:
        axis.axvline(statistics.fmean(chance), color="black", linewidth=0.6, label="IoU by chance")
    axis.set(xlabel="IoU of the patches that are kept with the true mask, real images, %",
             ylabel="student test accuracy in %", title=f"five shapes, seeds {seeds_of(lines)}")  # fmt: skip
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    return drawn


def _moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


STUDY = Study(
    name="attention", about=__doc__, cells=cells, measure=measure, table=table, figure=figure,
    picture="attention.png", words=ONE_TEACHER,
    options=add_options, check=check_clients, in_turn="",
    page=Page("docs/study.md", markdown=True, note=note),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
