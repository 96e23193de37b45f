"""What do crowded scenes ask of an inversion? `python -m simulations.crowded [--seeds 0 1 2]`.

Scenes of four fields, each with one shape; one to three of five classes are to be named, and discs, of no
class, fill the rest. The teacher says of each class whether it is there (binary cross-entropy), synthetic
images are made for sets of classes, and the student learns the teacher's answers to them. Mean average
precision over the classes, and how far the number of classes that are said to be there is from the true
one. Sparse inversion keeps a part of the patches: with more objects in a scene it has to keep them all.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F

from simulations.latest import Latest
from simulations.methods import clock
from simulations.methods.report import CONTROLS, spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.runner.ledger import digest
from simulations.sources import DATA, cells_of, check, note, of_both, options_of
from smi_fed.config import Settings
from smi_fed.data import ImageSet
from smi_fed.inversion import FeatureStatistics, feature_statistics, invert, trajectories
from smi_fed.models import Classifier, build_model, build_seeded
from smi_fed.pipeline import seeded
from smi_fed.shapes import CLASS_NAMES, draw_shapes
from smi_fed.training import Loss, predict, train

CLASSES, FILLER = ("ring", "square", "frame", "triangle", "star"), "disc"
FIELDS, MOST = 4, 3
"""Of a scene, and the most of them whose class is to be named."""

SETS = [chosen for count in range(1, MOST + 1) for chosen in itertools.combinations(range(len(CLASSES)), count)]
TRAINING, TEST = 2000, 500


class School(NamedTuple):
    """The teacher of one seed, its own scenes, what its client would send of their features, the test's, its scores."""

    teacher: Classifier
    shown: ImageSet
    statistics: FeatureStatistics
    test: ImageSet
    scores: Line


def measure(settings: Settings, cell: Cell) -> Line:
    """One student and its teacher."""
    key = digest(settings.seed, settings.model, settings.data, settings.client, str(cell.device))
    school = _SCHOOLS.of(key, lambda: school_of(settings, cell))
    begin = clock(cell.device)
    shown = images_of(settings, cell["source"], school)
    took = 0.0 if cell["source"] in CONTROLS else clock(cell.device) - begin
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    lessons = ImageSet(shown, torch.zeros(len(shown), dtype=torch.long), ("scene",))
    training = replace(settings.client.training, steps=settings.distillation.steps)
    train(student, lessons, training, generator=seeded(settings.seed, 1, 1), loss=answers_of(school.teacher))
    return {"inversion_seconds": took, "student": judged(student, school.test), "teacher": school.scores}


_SCHOOLS = Latest[School]()


def answers_of(teacher: nn.Module) -> Loss:
    """Binary cross-entropy to what the teacher says of each class; labels are not asked for."""

    def loss(model: nn.Module, images: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(images).sigmoid()
        return F.binary_cross_entropy_with_logits(model(images), wanted)

    return loss


def sets() -> Tensor:
    """What is in the scenes of each code, (codes, classes) of 0 and 1."""
    found = torch.zeros(len(SETS), len(CLASSES))
    for code, chosen in enumerate(SETS):
        found[code, list(chosen)] = 1
    return found


def scenes(count: int, size: int, generator: torch.Generator) -> ImageSet:
    """Scenes (count, 3, size, size) in [0, 1], labelled with their place in `SETS`."""
    codes = torch.randint(len(SETS), (count,), generator=generator)
    places = [CLASS_NAMES.index(name) for name in (*CLASSES, FILLER)]
    shapes = torch.tensor([[*SETS[code], *[len(CLASSES)] * FIELDS][:FIELDS] for code in codes.tolist()])
    order = torch.rand(count, FIELDS, generator=generator).argsort(1)
    labels = torch.tensor(places)[shapes.gather(1, order)]
    fields, _ = draw_shapes(labels.flatten(), size // 2, generator)
    rows = fields.view(count, 2, 2, *fields.shape[1:]).permute(0, 3, 1, 4, 2, 5)
    return ImageSet(rows.reshape(count, fields.shape[1], size, size), codes, tuple(map(str, SETS)))


def school_of(settings: Settings, cell: Cell) -> School:
    """The teacher is trained to say of each class whether it is there."""
    generator, spec = seeded(settings.seed, 3), settings.model.of_client(0)
    shown, test = (scenes(count, settings.data.image_size, generator) for count in (TRAINING, TEST))
    torch.manual_seed(settings.seed * 1000)
    teacher, there = build_model(spec).to(cell.device), sets().to(cell.device)

    def loss(model: nn.Module, images: Tensor, codes: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(images), there[codes])

    train(teacher, shown, settings.client.training, generator=seeded(settings.seed, 0), loss=loss)
    known = feature_statistics(teacher, shown.images.split(256))
    return School(teacher, shown, known, test, judged(teacher, test))


def images_of(settings: Settings, source: str, school: School) -> Tensor:
    """Images (n, c, h, w) of sets of classes, each set as likely."""
    generator, count = seeded(settings.seed, 1, 0), settings.server.images_per_teacher
    if source in CONTROLS:
        own = school.shown.images[torch.arange(min(count, len(school.shown)))]
        return own if source == "real" else torch.rand(own.shape, generator=generator)
    inversion = settings.inversion.scaled(settings.inversion.iterations)
    codes = torch.randint(len(SETS), (trajectories(school.teacher, inversion, count),), generator=generator)
    found = invert(school.teacher, sets()[codes], inversion, generator=generator, statistics=school.statistics)
    return found.images[:count]


def judged(model: nn.Module, scenes: ImageSet) -> Line:
    """Mean average precision, and the mean distance of the number of classes said to be there from the true one."""
    there, logits = sets()[scenes.labels], predict(model, scenes.images).cpu()
    wrong = ((logits > 0).sum(1) - there.sum(1)).abs()
    return {
        "map": float(average_precision_score(there.numpy(), logits.numpy(), average="macro")),
        "count_error": float(wrong.mean()),
    }


def table(lines: Lines) -> list[Table]:
    """A row of each source."""
    rows = [["images from", "mAP, %", "less the teacher's, points", "classes miscounted", "inversion seconds"]]
    for source in dict.fromkeys(line["source"] for line in lines):
        own = [line for line in lines if line["source"] == source]
        precision = [100 * line["student"]["map"] for line in own]
        lost = [100 * (line["student"]["map"] - line["teacher"]["map"]) for line in own]
        seconds = statistics.fmean(line["inversion_seconds"] for line in own)
        wrong = f"{statistics.fmean(line['student']['count_error'] for line in own):.2f}"
        rows.append([source, spread(precision), spread(lost), wrong, f"{seconds:.1f}" if seconds else ""])
    teachers = {line["seed"]: line["teacher"] for line in lines}.values()
    precision, wrong = (
        spread([100 * each["map"] for each in teachers]),
        statistics.fmean(each["count_error"] for each in teachers),
    )
    note = f"The teachers: {precision} % mAP, {wrong:.2f} classes miscounted."
    return [Table(f"crowded scenes, seeds {seeds_of(lines)}", rows, [note])]


WORDS = {
    "shapes": (
        *of_both(DATA["shapes"].client, "image_size=64", "kwargs.img_size=64", "kwargs.patch_size=8"),
        "data.image_size=64", "inversion.parametrisation.levels=[8,16,32]", "client.training.steps=800",
    ),
}  # fmt: skip
STUDY = Study(
    name="crowded", about=__doc__, cells=cells_of(WORDS), measure=measure, table=table,
    options=options_of(WORDS), check=check, in_turn="source",
    page=Page("docs/study.md", markdown=True, note=note),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
