"""Owners of real pictures and of pretrained models: `python -m simulations.owners [--seeds 0 1 2] [OVERRIDE ...]`.

Four owners fine-tune models that were really pretrained (conf/experiment/real.yaml; `make
real-data` makes pictures and models). Each has a style of its own, or their classes are
skewed; their architectures are equal or mixed. A student is distilled from synthetic pictures,
from real ones (the ceiling) and from noise (the floor). Beside it stands what one could do
instead: each owner alone, their ensemble, the average of their models (FedAvg), and a head
out of class statistics of the frozen start (FedCGS). Accuracy is the mean over all four
styles' held-out pictures.

On a processor with bfloat16 units `client.training.precision=bfloat16 inversion.precision=bfloat16
distillation.precision=bfloat16` saves more than half of the time.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from clients.app import own_images
from simulations.latest import Latest
from simulations.local_clients import check_clients, kept_images, trained_clients
from simulations.methods import control
from simulations.owners_report import figure, table
from simulations.real.__main__ import default_directory
from simulations.runner import Cell, Line, Page, Study, command
from simulations.runner.ledger import digest
from smi_fed.checks import require
from smi_fed.class_statistics import ClassStatistics, class_statistics, common_classes, discriminant, merged, put_head
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages
from smi_fed.models import Classifier, build_seeded
from smi_fed.pipeline import (
    TrainedTeacher,
    distill_student,
    joint_probabilities,
    seeded,
)
from smi_fed.starts import FROM_CLIENTS
from smi_fed.strategies.beginning import begin_from
from smi_fed.training import computing, predict

log = logging.getLogger("smi_fed")

OWNERS = 4
SKEWS: dict[str, tuple[str, ...]] = {
    "styles": (),
    "classes": ("data=real_labels", "distillation.ensemble=class_certainty"),
}
"""How the owners' pictures differ: each has one style of all classes, or its own share of each class in all styles."""

FEDERATIONS: dict[str, tuple[str, ...]] = {
    "equal": (),
    "mixed": ("model=real_mixed", "inversion.batchnorm=1.0"),
}


class Method(NamedTuple):
    """Where the student starts, the pictures that it learns from (synthetic | real | noise, "" for none), and more."""

    start: str
    pictures: str = ""
    overrides: tuple[str, ...] = ()


SMALL = (
    "model.student.name=vit_tiny_patch16_224", "model.student.start=null", "distillation.trainable=all",
    "+model.student.kwargs={patch_size: 14, embed_dim: 192, depth: 6, num_heads: 3, qk_norm: true}",
    "distillation.optimiser=muon", "distillation.layer_decay=1.0", "distillation.learning_rate=3e-3",
    "distillation.steps=600",
)  # fmt: skip
"""A student of another shape than any owner's, from random weights."""

ENSEMBLES = {"ensemble, mean": "uniform", "ensemble, by certainty": "certainty", "ensemble, by class": "class",
             "ensemble, by class and certainty": "class_certainty"}  # fmt: skip
METHODS: dict[str, Method] = {
    "FedAvg": Method("average"),
    "class statistics": Method("statistics"),
    "student": Method("statistics", "synthetic"),
    "student from FedAvg": Method("average", "synthetic"),
    "student on real pictures": Method("statistics", "real"),
    "student on noise": Method("statistics", "noise"),
    "student of another shape, random start": Method("random", "synthetic", SMALL),
}
ALONE = "alone"
NAMES = (ALONE, *ENSEMBLES, *METHODS)


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--skews", nargs="+", choices=SKEWS, default=list(SKEWS))
    parser.add_argument("--federations", nargs="+", choices=FEDERATIONS, default=list(FEDERATIONS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))


def cells(options: Namespace) -> list[Cell]:
    """Every method under each skew and in each federation; models that differ have no average."""
    return [
        Cell(
            {"skew": skew, "federation": federation, "method": name},
            (*overrides_of(name), *options.overrides),  # the command line's again: it outweighs a method's
            (*SKEWS[skew], *FEDERATIONS[federation]),
        )
        for skew in options.skews
        for federation in options.federations
        for name in options.methods
        if not (federation == "mixed" and name in METHODS and METHODS[name].start == "average")
    ]


def overrides_of(name: str) -> tuple[str, ...]:
    """What a method changes of the settings."""
    method = METHODS.get(name, Method("own"))
    return (f"strategy.start={method.start}", *method.overrides)


@dataclass(frozen=True)
class Owners:
    """The owners of one seed, skew and federation, with what is asked of them.

    Attributes:
        teachers: their models after training, with class statistics of the student's start.
        tests: each style's held-out pictures.
        logits: (owners, pictures, classes) on all of those.
    """

    teachers: tuple[TrainedTeacher, ...]
    tests: dict[str, ImageSet]
    logits: Tensor


def measure(settings: Settings, cell: Cell) -> Line:
    """One student, or what the owners say without one."""
    owners = owners_of(settings, cell)
    if cell["method"] == ALONE:
        counts = [teacher.label_counts for teacher in owners.teachers]
        return {"accuracy": [by_style(each, owners.tests) for each in owners.logits], "label_counts": counts}
    if kind := ENSEMBLES.get(cell["method"]):
        return {"accuracy": by_style(joint_probabilities(owners.logits, owners.teachers, kind), owners.tests)}
    return taught(settings, cell, owners)


def taught(settings: Settings, cell: Cell, owners: Owners) -> Line:
    """The accuracy of a student, as distilled and with a head out of class statistics of its own features.

    The latter takes a second message, in which each owner shows its pictures to the student once.
    """
    method = METHODS[cell["method"]]
    student = build_seeded(settings.model.student, settings.seed)
    if settings.strategy.start in FROM_CLIENTS:
        begin_from(settings.strategy.start, student, owners.teachers)
    student.to(cell.device)
    found = pictures(method.pictures, settings, cell, owners) if method.pictures else []
    line: Line = {"start": method.start, "pictures": sum(map(len, found))}
    if found:
        generator = seeded(settings.seed, 1, OWNERS)
        record = distill_student(student, owners.teachers, found, settings.distillation, generator)
        line |= {"steps": record.steps, "kept": record.kept, "distillation_seconds": record.seconds}
    line["accuracy"] = by_style(said(settings, student, owners.tests), owners.tests)
    if found or method.start != "statistics":
        parts = [sums_of(settings, student, number) for number in range(OWNERS)]
        put_head(student, discriminant(merged(parts)))
        line["finished_accuracy"] = by_style(said(settings, student, owners.tests), owners.tests)
    return line


def pictures(kind: str, settings: Settings, cell: Cell, owners: Owners) -> list[SparseImages]:
    """As many of each owner: synthetic ones, which are kept on disk, the owners' own ("real") or noise."""
    if kind != "synthetic":
        return list(control(kind, settings, owners.teachers))
    return [kept_images(settings, n, each, cell.output / "pictures") for n, each in enumerate(owners.teachers)]


def owners_of(settings: Settings, cell: Cell) -> Owners:
    """Those of a cell, kept in memory while cells ask for the same ones."""
    key = digest(settings.seed, settings.model, settings.data, settings.client, settings.inversion.statistics)
    return _OWNERS.of(key, lambda: _owners(settings, cell))


_OWNERS = Latest[Owners]()


def _owners(settings: Settings, cell: Cell) -> Owners:
    start = build_seeded(settings.model.student, settings.seed).to(cell.device)
    known = []
    for number, teacher in enumerate(trained_clients(settings, OWNERS, cell.output / "clients")):
        teacher.model.to(cell.device)
        known.append(replace(teacher, class_statistics=sums_of(settings, start, number)))
    tests = styles(settings)
    logits = torch.stack([said(settings, teacher.model, tests) for teacher in known])
    return Owners(tuple(known), tests, logits)


def sums_of(settings: Settings, student: Classifier, number: int) -> ClassStatistics:
    """Class statistics of what the student sees in an owner's pictures."""
    images = own_images(settings, number, OWNERS, student.spec)
    images = images.select(common_classes(images.labels, settings.client.minimum_examples))
    with computing(settings.client.training, student.mean.device):
        return class_statistics(student, zip(images.images.split(256), images.labels.split(256), strict=True))


def styles(settings: Settings) -> dict[str, ImageSet]:
    """Each style's held-out pictures."""
    found = {}
    for path in sorted(path for path in (default_directory() / "pictures").iterdir() if path.is_dir()):
        config = replace(settings.data, source="folder", name=str(path), nodes=())
        found[path.name] = load_images(config)[1].loaded()
    return found


def said(settings: Settings, model: Classifier, tests: dict[str, ImageSet]) -> Tensor:
    """Logits (pictures, classes) on all styles' held-out pictures, in the precision of the distillation."""
    with computing(settings.distillation, model.mean.device):
        return torch.cat([predict(model, test.resized(model.image_size).images) for test in tests.values()])


def by_style(answers: Tensor, tests: dict[str, ImageSet]) -> dict[str, float]:
    """Accuracy in [0, 1] on each style, of logits or probabilities (pictures, classes) on all of them."""
    parts = answers.argmax(1).split([len(test) for test in tests.values()])
    right = [(part == test.labels).float().mean() for part, test in zip(parts, tests.values(), strict=True)]
    return {style: float(each) for style, each in zip(tests, right, strict=True)}


def check(settings: Settings, _cell: Cell) -> None:
    """Raise SettingError where `make real-data` was not, or for clients that cannot be."""
    made = (default_directory() / "pictures" / "all.csv").is_file()
    require(made, "SMI_FED_REAL", str(default_directory()), "the directory that `make real-data` made")
    check_clients(settings)


STUDY = Study(
    name="owners", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="owners.png",
    words=("experiment=real",), options=add_options, check=check, in_turn="", apart="skew",
    page=Page(
        "docs/real-owners.md", markdown=True,
        note=lambda _: ": mean accuracy over four styles' held-out pictures in %, mean ± standard deviation over the "
        "seeds; every model but those of random weights begins from a pretrained one.",
    ),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
