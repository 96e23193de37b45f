"""Every method against every other: `python -m simulations.methods [--seeds 0 1 2] [OVERRIDE ...]`.

For each data set (digits, shapes) and setting (one teacher, a federation of four) the same
trained clients are inverted by each method at several iteration budgets, and a student is
distilled from the images, as many for each method. Noise and the clients' own images stand
beside them. Every piece is one JSON line, written when it is done; a study that was stopped
goes on where it was. The picture is student accuracy against inversion seconds.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clients.app import own_images
from simulations.latest import Latest
from simulations.local_clients import check_clients, trained_clients
from simulations.methods import report
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Line, Page, Study, command
from simulations.runner.ledger import digest
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages
from smi_fed.inversion.amortised import as_images
from smi_fed.models import build_seeded
from smi_fed.pipeline import (
    PipelineConfig,
    TrainedTeacher,
    distill_student,
    draw_targets,
    invert_teacher,
    seeded,
)
from smi_fed.scores import ensemble_accuracy
from smi_fed.training import accuracy

DATA: dict[str, tuple[str, ...]] = {"digits": (), "shapes": ("inversion.parametrisation.levels=[4,8,16]",)}
"""Data sets, and what each needs of the inversion: shapes have detail that 8 x 8 grids cannot show."""

SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {"one": (1, ()), "four": (4, ("server.images_per_teacher=100",))}
"""Number of clients, and what their number changes: four times 100 images are enough to compare."""


class Method(NamedTuple):
    """What a method changes of conf/experiment/methods.yaml, and how many times as many images it has as others.

    Rebirth has three stops, so that with 4 it has as many trajectories as others have images.
    """

    overrides: tuple[str, ...] = ()
    images: int = 1


REBIRTH = ("inversion=rebirth", "inversion.schedule='10:0.25,20:0.33,30:0.5'")
METHODS: dict[str, Method] = {
    "dense": Method(("inversion=dense", "inversion.schedule=''")),
    "random": Method(("inversion=sparse", "inversion.selection=random")),
    "attention": Method(("inversion=attention",)),
    "proportional": Method(("inversion=proportional",)),
    "stratified": Method(("inversion=stratified",)),
    "gradient": Method(("inversion=gradient",)),
    "unsettled": Method(("inversion=unsettled",)),
    "tempered": Method(("inversion=tempered",)),
    "adaptive": Method(("inversion=adaptive",)),
    "early stop": Method(("inversion=early_stop",)),
    "rebirth": Method(REBIRTH),
    "rebirth, equal trajectories": Method(REBIRTH, images=4),
    "rebirth at random, equal trajectories": Method((*REBIRTH, "inversion.selection=random"), images=4),
    "attention, twice the images": Method(("inversion=attention",), images=2),
    "relabelled": Method(("inversion=attention", "distillation=relabelled")),
    "random, frozen": Method(("inversion=sparse", "inversion.selection=random", "inversion.background=frozen")),
    "attention, frozen": Method(("inversion=attention", "inversion.background=frozen")),
}


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    names = [*METHODS, *CONTROLS]
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--budgets", type=int, nargs="+", default=[20, 40], help="iterations per image")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)


def cells(options: Namespace) -> list[Cell]:
    """Each method at each budget, and controls without one."""
    return [
        cell_of(data, setting, method, budget)
        for data in options.data
        for setting in options.settings
        for method in options.methods
        for budget in ([0] if method in CONTROLS else options.budgets)
    ]


def cell_of(data: str, setting: str, method: str, iterations: int) -> Cell:
    """One method at one budget; 0 iterations for a control."""
    return Cell(
        {"data": data, "setting": setting, "method": method, "iterations": iterations},
        METHODS[method].overrides if method in METHODS else (),
        (f"data={data}", f"model={data}", *DATA[data], *SETTINGS[setting][1]),
    )


def check(settings: Settings, cell: Cell) -> None:
    """Raise SettingError for clients that cannot be and for a budget that does not fit the schedule."""
    check_clients(settings)
    if cell["method"] not in CONTROLS:
        settings.inversion.scaled(cell["iterations"])


def measure(settings: Settings, cell: Cell) -> Line:
    """One student from one method at one budget."""
    images = METHODS[cell["method"]].images if cell["method"] in METHODS else 1
    return measure_piece(settings, cell, SETTINGS[cell["setting"]][0], images)


def measure_piece(settings: Settings, cell: Cell, clients: int, images: int = 1) -> Line:
    """The line of one method ("method" of `cell`) at one budget ("iterations").

    Args:
        clients: how many there are.
        images: how many times as many of each as the settings say.
    """
    teachers = clients_on(settings, cell, clients)
    if cell["method"] in CONTROLS:
        found, inverted = list(control(cell["method"], settings, teachers)), {"inversion_seconds": 0.0, "flops": 0}
    else:
        found, inverted = invert_all(settings, teachers, cell["iterations"], images, cell.device)
    return {**inverted, **taught(settings, cell, teachers, found)}


def clients_on(settings: Settings, cell: Cell, number: int) -> list[TrainedTeacher]:
    """So many trained clients, on the cell's device; kept in memory while cells ask for the same ones."""
    uses = settings.inversion.statistics > 0, settings.distills
    key = digest(settings.seed, settings.model, settings.data, settings.client, uses, number, cell.output, cell.device)

    def trained() -> list[TrainedTeacher]:
        found = trained_clients(settings, number, cell.output / "clients")
        for teacher in found:
            teacher.model.to(cell.device)
        return found

    return _CLIENTS.of(key, trained)


_CLIENTS = Latest[list[TrainedTeacher]]()


def taught(settings: Settings, cell: Cell, teachers: Sequence[TrainedTeacher], found: Sequence[SparseImages]) -> Line:
    """What a line tells of the student that these images teach, and of the ensemble."""
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    generator = seeded(settings.seed, 1, len(teachers))
    begin = clock(cell.device)
    distill_student(student, teachers, found, settings.distillation, generator)
    distilled = clock(cell.device) - begin
    test = load_images(settings.data)[1].of_classes(settings.model.student.class_names)
    count = sum(map(len, found))
    return {
        "images": count,
        "distillation_seconds": distilled,
        "kept_fraction": sum(each.kept_fraction * len(each) for each in found) / count,
        "student_test_accuracy": accuracy(student, test),
        "ensemble_test_accuracy": ensemble_accuracy(teachers, settings.distillation.ensemble, test),
    }


def clock(device: torch.device) -> float:
    """Seconds of this process's work: on a CPU those that it had, whatever else the machine does."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def invert_all(
    settings: Settings, teachers: Sequence[TrainedTeacher], iterations: int, images: int, device: torch.device
) -> tuple[list[SparseImages], Line]:
    """Images of every teacher, and what they took by `clock`."""
    inversion = settings.inversion.scaled(iterations)
    pipeline = PipelineConfig(settings.server.images_per_teacher * images, inversion, settings.distillation)
    found = [
        invert_teacher(teacher, number, pipeline, seeded(settings.seed, 1, number), clock=lambda: clock(device))
        for number, teacher in enumerate(teachers)
    ]
    return [each for each, _ in found], {
        "schedule": str(inversion.schedule),
        "inversion_seconds": sum(record.seconds for _, record in found),
        "clock": "process" if device.type == "cpu" else "wall",
        "flops": sum(record.flops for _, record in found),
    }


def control(name: str, settings: Settings, teachers: Sequence[TrainedTeacher]) -> Iterator[SparseImages]:
    """As many images of each client, one of `CONTROLS`."""
    for number, teacher in enumerate(teachers):
        generator = seeded(settings.seed, 1, number)
        targets = draw_targets(teacher, settings.server.images_per_teacher, generator)
        size = (len(targets), len(teacher.model.mean), *teacher.model.image_size)
        pixels = torch.rand(size, generator=generator)
        if name == "real":
            own = own_images(settings, number, len(teachers), teacher.model.spec)
            pixels = torch.stack([_one_of(own, int(target), generator) for target in targets])
        yield uninverted(pixels, targets, number)


def uninverted(pixels: Tensor, targets: Tensor, teacher: int) -> SparseImages:
    """Images (b, c, h, w) in [0, 1] that no inversion made, each a single patch; -1 is the number of no teacher."""
    return as_images(pixels, targets, (1, 1), teacher)


def _one_of(images: ImageSet, label: int, generator: torch.Generator) -> torch.Tensor:
    rows = (images.labels == label).nonzero()[:, 0]
    return images.images[rows[torch.randint(len(rows), (), generator=generator)]]


STUDY = Study(
    name="methods", about=__doc__, cells=cells, measure=measure, table=report.table, figure=report.figure,
    picture="methods.png", words=("experiment=methods",), options=add_options, check=check,
    page=Page(
        "docs/inversion-methods.md", markdown=True,
        note=lambda _: ": student test accuracy in %, mean ± standard deviation over the seeds (inversion seconds of "
        "the process on one thread).",
    ),
)  # fmt: skip
main = command(STUDY)
