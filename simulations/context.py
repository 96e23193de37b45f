"""Does leaving patches out help where the background misleads? `python -m simulations.context [--seeds 0 1 2]`.

The idea of Waterbirds (Sagawa et al., 2020) in small: two kinds of objects on two kinds of ground. They are squares
and stars, or animals and food in real pictures of all styles. In training nearly every object is on its own kind's
ground; test images have all four groups alike. A model that goes by the ground fails in the two groups where it
misleads, so the worst group counts. One teacher is inverted with all patches and with those that attention or chance
chose; a student is distilled from each, from noise, and from the teacher's own images. A student of real pictures is a
new head on the teacher's frozen backbone.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clients.app import own_statistics
from simulations.attention import scored
from simulations.latest import Latest
from simulations.masks import coverage, iou, kept, masked
from simulations.methods import invert_all, uninverted
from simulations.methods.report import CONTROLS, spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.runner.ledger import digest
from simulations.sources import DATA, STOP, by_data, cells_of, check, note, of_both, options_of, told
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages, StopSchedule
from smi_fed.inversion.teacher import adapt
from smi_fed.models import Classifier, build_model, build_seeded
from smi_fed.pipeline import TrainedTeacher, distill_student, seeded
from smi_fed.training import predict, train

OWN_GROUND = 0.95
"""Share of the training images whose object is on its own kind's ground, as in Waterbirds."""

GROUNDS = ((0.15, 0.35, 0.75), (0.25, 0.6, 0.2))
"""Red, green and blue of water and of grass; half of the ground's colour, the other half stays the image's."""


class School(NamedTuple):
    """The teacher of one seed, the images that it was trained on, the test's, and what a line tells of it."""

    teacher: TrainedTeacher
    shown: ImageSet
    test: ImageSet
    told: Line


def measure(settings: Settings, cell: Cell) -> Line:
    """One student and its teacher, by group; and how well the teacher's attention finds the object."""
    key = digest(settings.seed, settings.model, settings.data, settings.client, str(cell.device))
    school = _SCHOOLS.of(key, lambda: school_of(settings, cell))
    found, line = images_of(settings, cell, school)
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    distill_student(student, [school.teacher], [found], settings.distillation, seeded(settings.seed, 1, 1))
    return {**line, "student": by_group(student, school.test), **school.told}


_SCHOOLS = Latest[School]()


def school_of(settings: Settings, cell: Cell) -> School:
    """The teacher is trained on all images, most of whose objects are on their own kind's ground."""
    names = settings.model.student.class_names
    images, test = (masked(each.of_classes(names)) for each in load_images(settings.data))
    own = torch.rand(len(images), generator=seeded(settings.seed, 3)) < OWN_GROUND
    shown = grounded(images, torch.where(own, images.labels, 1 - images.labels))
    torch.manual_seed(settings.seed * 1000)
    model = build_model(settings.model.of_client(0)).to(cell.device)
    train(model, shown, settings.client.training, generator=seeded(settings.seed, 0))
    counts, known = tuple(shown.label_counts().tolist()), own_statistics(settings, model, shown)
    told = {"teacher": by_group(model, test), "attention_iou": attention_iou(model, test)}
    return School(TrainedTeacher("teacher", model, len(shown), counts, known), shown, test, told)


def grounded(images: ImageSet, grounds: Tensor) -> ImageSet:
    """Images with masks whose ground takes the colour of `grounds` (n,), places in `GROUNDS`."""
    assert images.masks is not None
    colours = torch.tensor(GROUNDS)[grounds][:, :, None, None]
    pixels = images.images[torch.arange(len(images))]
    return replace(images, images=torch.where(images.masks[:, None], pixels, (pixels + colours) / 2))


def attention_iou(model: Classifier, images: ImageSet) -> float:
    """Of as many patches as a stop leaves and the object's mask, in [0, 1]; every image on both grounds."""
    assert images.masks is not None
    covered = coverage(images.masks, adapt(model).patch_size)
    count = int(covered.shape[1] * (1 - StopSchedule.parse(STOP).stops[0][1]))
    both = (grounded(images, torch.full_like(images.labels, ground)) for ground in (0, 1))
    found = [scored(model, each, "attention").cpu() for each in both]
    return statistics.fmean(iou(kept(scores, count), covered) for scores in found)


def images_of(settings: Settings, cell: Cell, school: School) -> tuple[SparseImages, Line]:
    """What the student is shown, and what it took."""
    if cell["source"] not in CONTROLS:
        (found,), line = invert_all(settings, [school.teacher], settings.inversion.iterations, 1, cell.device)
        return found, line
    generator = seeded(settings.seed, 1, 0)
    rows = torch.randperm(len(school.shown), generator=generator)[: settings.server.images_per_teacher]
    pixels = school.shown.images[rows]
    if cell["source"] == "noise":
        pixels = torch.rand(pixels.shape, generator=generator)
    return uninverted(pixels, school.shown.labels[rows], 0), {"inversion_seconds": 0.0}


def by_group(model: nn.Module, images: ImageSet) -> list[float]:
    """Accuracy in [0, 1] of class 0 on ground 0 and 1, and of class 1 on ground 0 and 1; every image on both."""
    found = list[float]()
    for label, ground in itertools.product((0, 1), (0, 1)):
        own = images.select((images.labels == label).nonzero()[:, 0])
        said = predict(model, grounded(own, torch.full_like(own.labels, ground)).images)
        found.append(float((said.argmax(1).cpu() == label).float().mean()))
    return found


def scores(groups: Sequence[float]) -> tuple[float, float]:
    """Of the groups' accuracies the mean and the least, in %."""
    return 100 * statistics.fmean(groups), 100 * min(groups)


def leaning(groups: Sequence[float]) -> float:
    """How much better objects are known on their own kind's ground than on the other's, in points."""
    own, other = (groups[0] + groups[3]) / 2, (groups[1] + groups[2]) / 2
    return 100 * (own - other)


def table(lines: Lines) -> list[Table]:
    """Of each data set a row of each source: all groups alike, and the worst; and of the teacher."""
    return [_table(data, own) for data, own in by_data(lines).items()]


def _table(data: str, lines: Lines) -> Table:
    rows = [["images from", "mean of the groups, %", "worst group, %", "less the teacher's worst",
             "leaning on the ground, points", "inversion seconds"]]  # fmt: skip
    for source in dict.fromkeys(line["source"] for line in lines):
        own = [line for line in lines if line["source"] == source]
        mean, worst = zip(*(scores(line["student"]) for line in own), strict=True)
        lost = [scores(line["student"])[1] - scores(line["teacher"])[1] for line in own]
        leans = spread([leaning(line["student"]) for line in own])
        took = statistics.fmean(line["inversion_seconds"] for line in own)
        seconds = f"{took:.1f}" if took else ""
        rows.append([source, spread(list(mean)), spread(list(worst)), spread(lost), leans, seconds])
    teachers = {line["seed"]: scores(line["teacher"]) for line in lines}
    mean, worst = (spread(list(each)) for each in zip(*teachers.values(), strict=True))
    leans = spread(list({line["seed"]: leaning(line["teacher"]) for line in lines}.values()))
    overlap = spread(list({line["seed"]: 100 * line["attention_iou"] for line in lines}.values()))
    note = (
        f"The teachers: {mean} % in the mean of the groups, {worst} % in the worst, leaning on the ground by {leans} "
        f"points; the patches that their attention chooses have an IoU of {overlap} % with the object."
    )
    return Table(f"{KINDS[data]} on misleading ground, seeds {seeds_of(lines)}", rows, [note])


def figure(lines: Lines) -> Any:
    """Of each data set the worst group and the mean of each source, and the teacher's."""
    from matplotlib.figure import Figure

    kinds = by_data(lines)
    drawn = Figure(figsize=(8, 4 * len(kinds)), layout="constrained")
    for axis, (data, own) in zip(drawn.subplots(len(kinds), squeeze=False)[:, 0], kinds.items(), strict=True):
        _draw(axis, own)
        axis.set_title(f"{KINDS[data].capitalize()}, the ground misleads; seeds {seeds_of(own)}")
    return drawn


def _draw(axis: Any, lines: Lines) -> None:
    names = list(dict.fromkeys(line["source"] for line in lines))
    for line in lines:
        place, (mean, worst) = names.index(line["source"]), scores(line["student"])
        axis.plot([place, place], [worst, mean], color="lightgray", zorder=1)
        axis.scatter(place, mean, color="tab:blue", label="mean of the groups")
        axis.scatter(place, worst, color="tab:red", label="worst group")
    for label, colour, which in (("the teacher's mean", "tab:blue", 0), ("the teacher's worst", "tab:red", 1)):
        level = statistics.fmean(scores(line["teacher"])[which] for line in lines)
        axis.axhline(level, color=colour, linestyle="--", linewidth=1, label=label)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="accuracy in %", ylim=(0, 100))
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once.keys(), fontsize=8, loc="upper center", ncols=4)


KINDS = {"shapes": "squares and stars", "real": "animals and food"}
WORDS = {
    "shapes": of_both(DATA["shapes"].client, "num_classes=2", "class_names=[square,star]"),
    "real": ("data=real_labels", *of_both(DATA["real"].client, "num_classes=2", "class_names=[animals,food]")),
}
STUDY = Study(
    name="context", about=__doc__, cells=cells_of(WORDS), measure=measure, table=table, figure=figure,
    picture="context.png", options=options_of(WORDS), check=check, in_turn="source", apart="data",
    page=Page("docs/study.md", markdown=True, note=note, arguments=told("--data", "data")),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
