"""What images carry from a teacher to a student: `python -m simulations.transfer [--data real digits shapes]`.

One trained teacher, and a student that is distilled from images of each source: dense, sparse (by
attention) and rebirth (at random) inversion, noise, and the teacher's own training pictures. The
student is a new head on a pretrained backbone that stays as it is (the protocol of Hu et al., ICML
2024), a pretrained model that is tuned as a whole, or begins from random weights. Sources have
equally many images, or as many as dense's seconds buy. Each line keeps the student's test accuracy
over its steps and their seconds: the paper's claim is that it converges sooner.

On a GPU:
`--data real server.device=cuda client.device=cuda client.training.precision=bfloat16 inversion.precision=bfloat16
distillation.precision=bfloat16`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from simulations.convergence import METHODS, SHAPES, SMOKE, rate_of
from simulations.curve import Curve
from simulations.latest import Latest
from simulations.methods import clients_on, control, invert_all
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Line, Page, Study, command
from simulations.runner.ledger import digest
from simulations.sources import check
from simulations.transfer_report import DENSE, figure, note, table
from smi_fed.config import Settings
from smi_fed.data import ImageSet, shared_images
from smi_fed.inversion import SparseImages, StopSchedule
from smi_fed.inversion.stopping import Keep
from smi_fed.models import Classifier, build_seeded
from smi_fed.pipeline import TrainedTeacher, distill_student, seeded
from smi_fed.training import accuracy, computing


class Data(NamedTuple):
    """Settings of a data set, what makes them small, and whether its students are pretrained, scratch or both."""

    overrides: tuple[str, ...]
    smoke: tuple[str, ...]
    protocols: tuple[str, ...]


ITERATIONS, IMAGES = 20, 400
MOST = 8
"""So many times dense's images are the most that its seconds buy."""

SMOKE_TEST = 64
"""Test images of a smoke run."""

COMMON = ("data.scheme=iid", "evaluation=none")
DATA: dict[str, Data] = {
    "real": Data(
        ("experiment=real", "data=real_labels", "data.memory=2048", "strategy.start=own", *COMMON),
        (*SMOKE, "client.training.steps=2", "client.training.batch_size=8", "client.training.validation=0.0",
         "distillation.batch_size=8", "inversion.statistics=0.0"),
        ("head", "full"),
    ),
    "digits": Data(("experiment=methods", *COMMON), SMOKE, ("scratch",)),
    "shapes": Data(("experiment=methods", *SHAPES, *COMMON), SMOKE, ("scratch",)),
}  # fmt: skip
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "head": ("distillation=head", "distillation.trainable=head"),
    "full": ("distillation=finetune", "distillation.trainable=all"),
    "scratch": (),
}
TO_THE_END = ("distillation.validation=0.0", "distillation.epochs=null")
"""The student at the end of a curve is the one that is left."""

SOURCES: dict[str, tuple[str, ...]] = {
    DENSE: METHODS["dense"],
    "sparse": ("inversion=attention", "inversion.selection=attention", "inversion.schedule='2:0.5,5:0.5'"),
    "rebirth": ("inversion=rebirth", "inversion.selection=random", "inversion.schedule='5:0.25,10:0.33,15:0.5'"),
    **dict.fromkeys(CONTROLS, ()),
}
KNOWN_AS = {DENSE: "dense", "sparse": "attention", "rebirth": "rebirth at random"}
"""What the study of convergence calls a source, by which it has its learning rate."""

BUDGETS = ("images", "seconds")
BOUGHT = ("sparse", "rebirth")
"""Sources whose images are counted by dense's seconds too: the others take none."""


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--images", type=int, default=IMAGES, help="of each source, and of dense for its seconds")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each source by each budget; its students one after the other, so that its images are made once."""
    return [
        Cell(
            {"data": data, "protocol": protocol, "source": source, "budget": budget, "smoke": options.smoke},
            (*SOURCES[source], *tuned(data, source), *TO_THE_END),
            (*DATA[data].overrides, f"inversion.iterations={ITERATIONS}", *PROTOCOLS[protocol],
             f"server.images_per_teacher={options.images}", *(DATA[data].smoke if options.smoke else ())),
        )
        for data in options.data
        for budget in options.budgets
        for source in options.sources
        if budget == "images" or source in BOUGHT
        for protocol in DATA[data].protocols
        if protocol in options.protocols
    ]  # fmt: skip


def tuned(data: str, source: str) -> tuple[str, ...]:
    """The learning rate of a source that is inverted; what is best on digits is used for shapes too."""
    if source not in KNOWN_AS:
        return ()
    return (f"inversion.learning_rate={rate_of('real' if data == 'real' else 'core', KNOWN_AS[source])}",)


@dataclass(frozen=True)
class School:
    """The teacher of one seed and data set, on the cell's device.

    Attributes:
        test: held-out images, there too.
        accuracy: the teacher's on them, in [0, 1].
        made: the images that were asked for last, by their name.
        took: lines of all that were made, by their name.
    """

    teacher: TrainedTeacher
    test: ImageSet
    accuracy: float
    made: dict[str, SparseImages] = field(default_factory=dict)
    took: dict[str, Line] = field(default_factory=dict)


def measure(settings: Settings, cell: Cell) -> Line:
    """One student's curve."""
    school = school_of(settings, cell)
    if cell.device.type == "cuda":
        _warm(settings, cell, school)
    count, bought = count_of(settings, cell, school)
    found, line = pictures(settings, cell, school, count)
    curve = taught(settings, cell, school, found)
    scores = {"student_test_accuracy": curve[-1][2], "teacher_test_accuracy": school.accuracy}
    return {"images": len(found), **line, **bought, **scores, "curve": curve}


def school_of(settings: Settings, cell: Cell) -> School:
    """That of a cell, kept in memory while cells ask for the same one."""
    known = (settings.seed, settings.model, settings.data, settings.client, settings.inversion.statistics)
    key = digest(*known, str(cell.device), str(cell.output), cell["smoke"])
    return _SCHOOLS.of(key, lambda: _school(settings, cell))


_SCHOOLS = Latest[School]()


def _school(settings: Settings, cell: Cell) -> School:
    (teacher,) = clients_on(settings, cell, 1)
    _, test = shared_images(settings.data)
    if cell["smoke"]:
        test = test.select(torch.randperm(len(test), generator=seeded(settings.seed))[:SMOKE_TEST])
    test = test.loaded()
    test = replace(test, images=test.images.to(cell.device))
    return School(teacher, test, right(settings, teacher.model, test))


def right(settings: Settings, model: Classifier, test: ImageSet) -> float:
    """Accuracy in [0, 1], in the precision of the distillation."""
    with computing(settings.distillation, model.mean.device):
        return accuracy(model, test)


def count_of(settings: Settings, cell: Cell, school: School) -> tuple[int, Line]:
    """How many images a source has; and of one that dense's seconds buy what as many images took of both.

    Seconds buy in proportion: so many times as many images as dense takes longer for the same number.
    """
    count = settings.server.images_per_teacher
    if cell["budget"] == "images":
        return count, {}
    dense, own = (seconds_of(each, cell, school) for each in (without_stops(settings), settings))
    return max(1, min(MOST * count, int(count * dense / own))), {"dense_seconds": dense, "same_images_seconds": own}


def without_stops(settings: Settings) -> Settings:
    """The settings of dense inversion, from those of another source."""
    dense = replace(settings.inversion, schedule=StopSchedule(), stopping=Keep(), selection="random")
    return replace(settings, inversion=dense)


def seconds_of(settings: Settings, cell: Cell, school: School) -> float:
    """What the inversion of as many images as the settings say takes, measured in this process and once."""
    count = settings.server.images_per_teacher
    name = digest(settings.inversion, count)
    return float((school.took.get(name) or pictures(settings, cell, school, count)[1])["inversion_seconds"])


def pictures(settings: Settings, cell: Cell, school: School, count: int) -> tuple[SparseImages, Line]:
    """So many images of a cell's source, with what they took; those of the last call are not made again."""
    source = cell["source"]
    name = digest(source if source in CONTROLS else settings.inversion, count)
    if name not in school.made:
        school.made.clear()
        settings = replace(settings, server=replace(settings.server, images_per_teacher=count))
        if source in CONTROLS:
            (found,), line = control(source, settings, [school.teacher]), {"inversion_seconds": 0.0, "flops": 0}
        else:
            (found,), line = invert_all(settings, [school.teacher], settings.inversion.iterations, 1, cell.device)
        school.made[name], school.took[name] = found, line
    return school.made[name], school.took[name]


def taught(settings: Settings, cell: Cell, school: School, found: SparseImages) -> list[tuple[int, float, float]]:
    """The curve of a student of these images."""
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    curve = Curve(lambda: right(settings, student, school.test), settings.distillation.steps, cell.device)
    generator = seeded(settings.seed, 1, 1)
    record = distill_student(student, [school.teacher], [found], settings.distillation, generator, tell=curve.tell)
    curve.end(record.steps)
    return curve.points


def _warm(settings: Settings, cell: Cell, school: School) -> None:
    """Everything once in small: what a GPU loads when it is first used is in no measurement."""
    aside = replace(school, made={}, took={})
    few = replace(settings, distillation=replace(settings.distillation, steps=3),
                  server=replace(settings.server, images_per_teacher=8))  # fmt: skip
    inversion, distillation = (digest(settings.model, each) for each in (settings.inversion, settings.distillation))
    if cell["source"] not in CONTROLS and inversion not in _WARM:
        _WARM.add(inversion)
        pictures(few, cell, aside, 8)
    if distillation not in _WARM:
        _WARM.add(distillation)
        taught(few, cell, aside, *control("noise", few, [school.teacher]))


_WARM: set[str] = set()


STUDY = Study(
    name="transfer", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="transfer.png",
    options=add_options, check=check, in_turn="", apart="data",
    page=Page("docs/study.md", markdown=True, note=note),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
