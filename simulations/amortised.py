"""Need an image begin at noise? `python -m simulations.amortised [--seeds 0 1 2 3 4] [OVERRIDE ...]`.

On the same trained clients: the cheapest dense settings, images that begin at mixtures of finished ones or at a learned
start of their class and take few iterations, and a closed loop, in which the student's disagreement
with the ensemble says of which teacher and class the second half of the images is. Beside the closed
loop stands the same in two halves without it. Paired: each seed has the same clients for all.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from simulations.convergence import CONDITIONS, REBIRTH, SMOKE, rate_of
from simulations.local_clients import check_clients
from simulations.methods import clients_on, clock, invert_all, taught
from simulations.methods.report import spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.closed_loop import allotted, disagreement
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.inversion import SparseImages, invert, trajectories
from smi_fed.inversion.amortised import Amortised, invert_amortised
from smi_fed.models import build_seeded
from smi_fed.pipeline import TrainedTeacher, distill_student, draw_targets, own_priors, seeded
from smi_fed.training import accuracy

DENSE, RANDOM = ("inversion=dense", "inversion.schedule=''"), (*REBIRTH, "inversion.selection=random")
REFERENCE = "dense, 400 x 10"


class Way(NamedTuple):
    """How a method makes its images: settings, images a client, iterations, and what comes beside."""

    overrides: tuple[str, ...]
    images: int
    iterations: int
    amortised: Amortised | None = None
    loop: str = ""  # closed | even: in two halves


def dense(start: str, iterations: int, share: float = 0.25, pioneers: int = 10) -> Way:
    """Pioneers by dense inversion, the others from them."""
    return Way(DENSE, 400, pioneers, Amortised(start, share, iterations))  # pyright: ignore[reportArgumentType]


METHODS: dict[str, Way] = {
    REFERENCE: Way(DENSE, 400, 10),
    "dense, 400 x 5": Way(DENSE, 400, 5),
    "dense, 400 x 3": Way(DENSE, 400, 3),
    "dense, 100 x 10": Way(DENSE, 100, 10),
    "rebirth at random, 400 x 10": Way(RANDOM, 400, 10),
    "rebirth at random, 400 x 5": Way(RANDOM, 400, 5),
    "mixtures, 0": dense("mixtures", 0),
    "mixtures, 1": dense("mixtures", 1),
    "mixtures, 2": dense("mixtures", 2),
    "mixtures of few, 0": dense("mixtures", 0, 0.0625, 20),
    "mixtures of few, 2": dense("mixtures", 2, 0.0625, 20),
    "mixtures of rebirth, 0": Way(RANDOM, 400, 10, Amortised("mixtures", 0.0625, 0)),
    "learned, 1": dense("learned", 1),
    "learned, 2": dense("learned", 2),
    "rebirth in halves, even": Way(RANDOM, 400, 10, loop="even"),
    "rebirth in halves, closed loop": Way(RANDOM, 400, 10, loop="closed"),
}


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--condition", choices=("core", "real"), default="core", help="a federation of convergence")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """One for each method."""
    federation = CONDITIONS[options.condition]
    return [
        Cell(
            {"condition": options.condition, "method": name, "smoke": options.smoke},
            (*way.overrides, f"inversion.learning_rate={rate_of(options.condition, 'dense')}",
             f"server.images_per_teacher={way.images}", *(SMOKE if options.smoke else ())),
            (f"experiment={federation.experiment}", *federation.overrides),
        )
        for name, way in ((name, METHODS[name]) for name in options.methods)
    ]  # fmt: skip


def measure(settings: Settings, cell: Cell) -> Line:
    """One student."""
    way = METHODS[cell["method"]]
    teachers = clients_on(settings, cell, CONDITIONS[cell["condition"]].clients)
    if way.loop:
        return in_halves(settings, cell, teachers, way)
    if way.amortised is None:
        found, line = invert_all(settings, teachers, way.iterations, 1, cell.device)
        return {**line, **taught(settings, cell, teachers, found)}
    begin = clock(cell.device)
    found = [_amortised(settings, number, each, way, way.amortised) for number, each in enumerate(teachers)]
    seconds = clock(cell.device) - begin
    return {"inversion_seconds": seconds, **taught(settings, cell, teachers, found)}


def _amortised(settings: Settings, number: int, teacher: TrainedTeacher, way: Way, how: Amortised) -> SparseImages:
    """As many images of a client; with rebirth a pioneer is several."""
    generator, count = seeded(settings.seed, 1, number), settings.server.images_per_teacher
    config = own_priors(teacher, settings.inversion).scaled(way.iterations)
    made = invert_amortised(
        teacher.model, draw_targets(teacher, count, generator), config, how, generator=generator,
        statistics=teacher.statistics, teacher_id=number,
    )  # fmt: skip
    return made.select(torch.randperm(len(made), generator=generator)[:count])


def in_halves(settings: Settings, cell: Cell, teachers: Sequence[TrainedTeacher], way: Way) -> Line:
    """A student that learns of one half of the images, and then of both; a closed loop chooses the second half.

    The second half of the steps begins with an optimiser of its own, with the loop as without.
    """
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    half = settings.server.images_per_teacher // 2
    distillation = replace(settings.distillation, steps=max(1, settings.distillation.steps // 2))
    targets = [draw_targets(each, half, seeded(settings.seed, 1, n)) for n, each in enumerate(teachers)]
    found: list[SparseImages] = []
    seconds = {"inversion": 0.0, "distillation": 0.0}
    for part in range(2):
        begin = clock(cell.device)
        if part:
            targets = _next_targets(settings, teachers, found, student, half, way)
        made = [_inverted(settings, n, each, targets[n], way, part) for n, each in enumerate(teachers)]
        found = made if not part else [SparseImages.concat([a, b]) for a, b in zip(found, made, strict=True)]
        between = clock(cell.device)
        distill_student(student, teachers, found, distillation, seeded(settings.seed, 1, len(teachers), part))
        seconds["inversion"] += between - begin
        seconds["distillation"] += clock(cell.device) - between
    return {
        "images": sum(map(len, found)), "inversion_seconds": seconds["inversion"],
        "distillation_seconds": seconds["distillation"],
        "student_test_accuracy": accuracy(student, load_images(settings.data)[1]),
    }  # fmt: skip


def _next_targets(
    settings: Settings, teachers: Sequence[TrainedTeacher], found: Sequence[SparseImages], student: Any, half: int,
    way: Way,
) -> list[torch.Tensor]:  # fmt: skip
    if way.loop == "even":
        return [draw_targets(each, half, seeded(settings.seed, 2, n)) for n, each in enumerate(teachers)]
    apart = disagreement(student, teachers, found, settings.distillation.ensemble)
    counts = allotted(apart, half * len(teachers))
    return [  # a teacher about whom nothing is left to ask is inverted once all the same: nobody can invert nothing
        torch.arange(len(each)).repeat_interleave(each)
        if each.any()
        else draw_targets(teacher, 1, seeded(settings.seed, 2, n))
        for n, (each, teacher) in enumerate(zip(counts, teachers, strict=True))
    ]


def _inverted(
    settings: Settings, number: int, teacher: TrainedTeacher, targets: torch.Tensor, way: Way, part: int
) -> SparseImages:
    """About as many images as targets, in their proportions: with rebirth each is several images."""
    config = own_priors(teacher, settings.inversion).scaled(way.iterations)
    generator = seeded(settings.seed, 1, number, part)
    count = trajectories(teacher.model, config, len(targets))
    chosen = targets[torch.randperm(len(targets), generator=generator)[:count]]
    made = invert(teacher.model, chosen, config, generator=generator, statistics=teacher.statistics, teacher_id=number)
    return made.select(slice(len(targets)))


def table(lines: Lines) -> list[Table]:
    """Of each federation every method's accuracy and seconds, beside those of the reference on the same seeds."""
    return [
        _table(condition, [line for line in lines if line["condition"] == condition])
        for condition in dict.fromkeys(line["condition"] for line in lines)
    ]


def _table(condition: str, lines: Lines) -> Table:
    reference = {line["seed"]: line for line in lines if line["method"] == REFERENCE}
    rows = [["method", "student, %", "less the reference, points", "inversion seconds", "of the reference's"]]
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        paired = [(line, reference[line["seed"]]) for line in own if line["seed"] in reference]
        gains = [100 * (a["student_test_accuracy"] - b["student_test_accuracy"]) for a, b in paired]
        shares = [a["inversion_seconds"] / b["inversion_seconds"] for a, b in paired]
        rows.append([
            method, spread([100 * line["student_test_accuracy"] for line in own]), spread(gains),
            f"{statistics.fmean(line['inversion_seconds'] for line in own):.1f}",
            f"{statistics.median(shares):.2f}" if shares else "-",
        ])  # fmt: skip
    return Table(f"{condition}, seeds {seeds_of(lines)}; the reference is {REFERENCE}", rows)


STUDY = Study(
    name="amortised", about=__doc__, cells=cells, measure=measure, table=table, options=add_options,
    check=check_clients, apart="condition",
    page=Page(
        "docs/study.md", markdown=True,
        note=lambda _: ": seconds for all clients; on a CPU those of the process, on one thread.",
    ),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
