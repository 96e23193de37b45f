"""What hostile clients do to a student: `python -m simulations.hostile [--seeds 0 1 2] [OVERRIDE ...]`.

Two of eight clients train on false labels, send random weights, scale their logits or build in a backdoor. What they
send passes the server's admission. Beside the accuracy stands how often the student names the backdoor's class where
its trigger is shown, and which clients were weighted down. With `--data real` one of the four owners of
conf/experiment/real.yaml is hostile (`make real-data` makes pictures and models).
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simulations.hostile import report
from simulations.hostile.attacks import ATTACKS, TARGET, sent_by, with_trigger
from simulations.hostile.shuffling import surviving
from simulations.local_clients import check_clients, kept_images
from simulations.methods import clock
from simulations.owners import styles
from simulations.runner import Cell, Line, Page, Study, command
from simulations.runner.ledger import digest
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.distillation import Agreement, Mean, Opinion
from smi_fed.files import load_tensors, save_tensors
from smi_fed.inversion import SparseImages
from smi_fed.models import Classifier, build_seeded
from smi_fed.pipeline import TrainedTeacher, distill_student, opinions_of, seeded
from smi_fed.strategies.admission import cap_claims
from smi_fed.training import accuracy, computing, predict

log = logging.getLogger("smi_fed")

FORMAT, VERSION = "smi-fed.hostile-student", 1
NONE = "none"


class Federation(NamedTuple):
    """How many clients there are, how many of them are hostile, the first ones; and the settings."""

    clients: int
    hostile: int
    overrides: tuple[str, ...]


DATA = {
    "digits": Federation(8, 2, ("experiment=hostile",)),
    "real": Federation(4, 1, ("experiment=real", "strategy.start=pretrained")),
}
DEFENCES: dict[str, tuple[str, ...]] = {
    "mean": (),
    "median": ("distillation.robust=median",),
    "trimmed": ("distillation.robust=trimmed",),
    "agreement": ("distillation.robust=agreement", "distillation.robust.trigger=null"),
    "agreement and triggers": ("distillation.robust=agreement",),
}


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    attacks = [NONE, *ATTACKS]
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--skews", type=float, nargs="+", default=[1.0, 0.1], help="Dirichlet's parameter, of digits")
    parser.add_argument("--attacks", nargs="+", choices=attacks, default=attacks)
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))


def cells(options: Namespace) -> list[Cell]:
    """Every attack against every defence, under each skew; owners of real pictures have their own."""
    federation = DATA[options.data]
    skews: Sequence[Any] = options.skews if options.data == "digits" else ["styles"]
    return [
        Cell(
            {"data": options.data, "skew": skew, "attack": attack, "defence": defence},
            DEFENCES[defence],
            (*federation.overrides, *([f"data.alpha={skew}"] if skew != "styles" else [])),
        )
        for skew in skews
        for attack in options.attacks
        for defence in options.defences
    ]


@dataclass(frozen=True)
class Team:
    """The teachers that the server has, hostile ones first, and their images."""

    teachers: tuple[TrainedTeacher, ...]
    images: tuple[SparseImages, ...]
    hostile: int


def measure(settings: Settings, cell: Cell) -> Line:
    """One student, and what was said of its teachers."""
    team, test = team_of(settings, cell), test_of(settings)
    found, judging = [Opinion()] * len(team.teachers), 0.0
    if isinstance(settings.distillation.robust, Agreement):
        begin = clock(cell.device)
        found = opinions_of(team.teachers, team.images, settings.distillation.robust)
        judging = clock(cell.device) - begin
    student, seconds = taught(settings, cell, team, [each.factor for each in found])
    doubted = [each.factor < 1 for each in found]
    line: Line = {
        "hostile": team.hostile,
        "clients": len(team.teachers),
        "accuracy": accuracy(student, test),
        "backdoor_success": triggered(settings, student, test),
        "caught": sum(doubted[: team.hostile]),
        "wrongly_doubted": sum(doubted[team.hostile :]),
        "opinions": [asdict(each) for each in found],
        "judging_seconds": judging,
        "distillation_seconds": seconds,
        "label_counts": [teacher.label_counts for teacher in team.teachers],
    }
    if cell["attack"] in (NONE, "backdoor") and cell["defence"] == "mean":
        line["surviving"] = [surviving(*pair) for pair in zip(team.teachers, team.images, strict=True)]
    return line


def triggered(settings: Settings, student: Classifier, test: ImageSet) -> float:
    """Share of the test images of other classes that the student takes for `TARGET` where the trigger is on them."""
    images = test.images[(test.labels != TARGET).nonzero()[:, 0]]
    with computing(settings.distillation, student.mean.device):
        return float((predict(student, with_trigger(images)).argmax(1) == TARGET).float().mean())


def test_of(settings: Settings) -> ImageSet:
    """What the student is tested on; of real pictures all styles' held-out ones."""
    if not settings.data.nodes:
        return load_images(settings.data)[1]
    size = (settings.data.image_size, settings.data.image_size)
    parts = [each.resized(size).loaded() for each in styles(settings).values()]
    images: list[Tensor] = [part.images[torch.arange(len(part))] for part in parts]
    return ImageSet(torch.cat(images), torch.cat([part.labels for part in parts]), parts[0].class_names)


def team_of(settings: Settings, cell: Cell) -> Team:
    """The clients of a cell; models and images are kept on disk."""
    federation = DATA[cell["data"]]
    attack = None if cell["attack"] == NONE else cell["attack"]
    cache, hostile = cell.output / "clients", federation.hostile if attack else 0
    cache.mkdir(parents=True, exist_ok=True)
    sent = [
        sent_by(settings, number, federation.clients, attack if number < hostile else None, cache, cell.device)
        for number in range(federation.clients)
    ]
    teachers: Any = cap_claims(sent, settings.admission)  # type: ignore[arg-type]  # it needs no more than claims
    images = (kept_images(settings, n, each, cell.output / "images") for n, each in enumerate(teachers))
    return Team(tuple(teachers), tuple(images), hostile)


def taught(settings: Settings, cell: Cell, team: Team, factors: Sequence[float]) -> tuple[Classifier, float]:
    """The student of the teachers with a factor above 0, and the seconds that it took.

    Students that the same teachers taught in the same way are the same, and are kept on disk.
    """
    config = settings.distillation
    if isinstance(config.robust, Agreement):
        config = replace(config, robust=Mean())
    heard = [(place, f, team.teachers[place].digest, team.teachers[place].num_examples)
             for place, f in enumerate(factors) if f]  # fmt: skip
    name = digest(settings.seed, settings.model.student, asdict(config), heard, asdict(settings.inversion),
                  settings.server.images_per_teacher)  # fmt: skip
    path = cell.output / "students" / f"{name}.safetensors"
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    if path.exists():
        weights, told = load_tensors(path, FORMAT, VERSION)
        student.load_state_dict(weights)
        return student.eval(), float(told["seconds"])
    begin = clock(cell.device)
    generator = seeded(settings.seed, 1, len(team.teachers))
    distill_student(student, team.teachers, team.images, config, generator, factors=factors)
    seconds = clock(cell.device) - begin
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, student.state_dict(), FORMAT, VERSION, seconds=str(seconds))
    return student, seconds


STUDY = Study(
    name="hostile", about=__doc__, cells=cells, measure=measure, table=report.table, options=add_options,
    check=check_clients, in_turn="", apart="data",
    page=Page("docs/hostile.md", arguments=report.arguments, note=report.note),
)  # fmt: skip
main = command(STUDY)
