"""Does sparse reach a good student sooner? `python -m simulations.convergence [--conditions core ...] [--seeds 0 1 2]`.

The same trained clients are inverted by each method at several iterations *and* numbers of images,
for many images from few iterations are the cheapest dense, and a student is distilled from each.
The picture is the student's accuracy over the seconds of inversion and over the server's.
`--conditions tuning --seeds 100` tries as many learning rates for each method, on a seed of its own.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import NamedTuple

from simulations import frontier
from simulations.local_grid import local_run
from simulations.methods import check, measure_piece
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Line, Page, Study, command
from smi_fed.config import Settings


class Condition(NamedTuple):
    """What a federation has that differs from the core's: four clients, Dirichlet(0.3), digits, one round."""

    clients: int = 4
    overrides: tuple[str, ...] = ()
    experiment: str = "convergence"
    rounds: int = 1


ROUNDS = 5
OVER_ROUNDS = (
    f"strategy.rounds={ROUNDS}", f"client.training.steps={400 // ROUNDS}", f"distillation.steps={300 // ROUNDS}",
    "strategy.min_nodes=4", "pool.images=1600",
)  # fmt: skip
"""As many steps in all as in one round; images of all rounds teach."""

SHAPES = ("data=shapes", "model=shapes", "inversion.parametrisation.levels=[4,8,16]")
CONDITIONS: dict[str, Condition] = {
    "core": Condition(),
    "8 clients": Condition(8),
    "Dirichlet(0.1)": Condition(overrides=("data.alpha=0.1",)),
    "IID": Condition(overrides=("data.scheme=iid",)),
    "5 rounds": Condition(overrides=OVER_ROUNDS, rounds=ROUNDS),
    "shapes": Condition(overrides=SHAPES),
    "real": Condition(experiment="convergence_real"),
}
TUNING = {"tuning": "core", "tuning, real": "real"}
"""Where learning rates are tried, and whose federation that is."""

REBIRTH = ("inversion=rebirth", "inversion.schedule='10:0.25,20:0.33,30:0.5'")
METHODS: dict[str, tuple[str, ...]] = {
    "dense": ("inversion=dense", "inversion.schedule=''"),
    "attention": ("inversion=attention", "inversion.selection=attention"),
    "random": ("inversion=sparse", "inversion.selection=random"),
    "unsettled": ("inversion=unsettled", "inversion.selection=unsettled"),
    "rebirth": (*REBIRTH, "inversion.selection=attention"),
    "rebirth at random": (*REBIRTH, "inversion.selection=random"),
}
RATE = 0.4
RATES: dict[str, dict[str, float]] = {}
"""By condition, of methods whose best rate is not `RATE`; `--conditions tuning` says which of `TRIED` is the best."""

TRIED, TUNED_AT = (0.1, 0.2, 0.4, 0.8), (10, 200)
ITERATIONS, IMAGES = (5, 10, 20), (100, 400)
SMOKE = (
    "client.training.steps=20", "distillation.steps=5", "server.images_per_teacher=8", "inversion.batch_size=8",
    "client.minimum_examples=2",
)  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    names = [*METHODS, *CONTROLS]
    parser.add_argument("--conditions", nargs="+", choices=[*CONDITIONS, *TUNING], default=["core"])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--iterations", type=int, nargs="+", default=ITERATIONS)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="of each client")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each method at each number of iterations and images; controls at each number of images; rates to try."""
    found = list[Cell]()
    for condition in options.conditions:
        if condition in TUNING:
            tuned = [method for method in options.methods if method in METHODS]
            found += [cell_of(condition, each, *TUNED_AT, rate, options.smoke) for each in tuned for rate in TRIED]
            continue
        found += [
            cell_of(condition, method, iterations, images, rate_of(condition, method), options.smoke)
            for images in options.images
            for method in options.methods
            if federation_of(condition).rounds == 1 or method not in CONTROLS
            for iterations in ([0] if method in CONTROLS else options.iterations)
        ]
    return found


def cell_of(condition: str, method: str, iterations: int, images: int, rate: float, smoke: bool = False) -> Cell:
    """One student; 0 iterations for a control."""
    own, federation = METHODS.get(method, ()), federation_of(condition)
    return Cell(
        {"condition": condition, "method": method, "iterations": iterations, "images_per_client": images,
         "learning_rate": rate if own else 0.0, "smoke": smoke},
        (*own, *([f"inversion.learning_rate={rate}"] if own else []),
         f"server.images_per_teacher={images // federation.rounds}", *(SMOKE if smoke else ())),
        (f"experiment={federation.experiment}", *federation.overrides),
    )  # fmt: skip


def rate_of(condition: str, method: str) -> float:
    """The learning rate of a method."""
    return RATES.get(condition, {}).get(method, RATE)


def federation_of(condition: str) -> Condition:
    """The federation of a condition, or that in which rates are tried."""
    return CONDITIONS[TUNING.get(condition, condition)]


def measure(settings: Settings, cell: Cell) -> Line:
    """One student."""
    federation = federation_of(cell["condition"])
    if federation.rounds > 1:
        return over_rounds(settings, cell, federation.clients)
    return measure_piece(settings, cell, federation.clients)


def over_rounds(settings: Settings, cell: Cell, clients: int) -> Line:
    """A run of the app in this process: the last student, and seconds of the wall of all rounds."""
    settings = replace(settings, inversion=settings.inversion.scaled(cell["iterations"]))
    with local_run(settings, cell.words, clients) as (federated, grid):
        report = federated.execute(grid)
    return {
        "schedule": str(settings.inversion.schedule),
        "inversion_seconds": report["inversion"]["seconds"],
        "distillation_seconds": report["distillation"]["seconds"],
        "clock": "wall",
        "images": report["inversion"]["images"],
        "accuracy_by_round": [each["student_test_accuracy"] for each in report["rounds"]],
        "student_test_accuracy": report["student"]["test_accuracy"],
        "ensemble_test_accuracy": report["ensemble"]["test_accuracy"],
    }


STUDY = Study(
    name="convergence", about=__doc__, cells=cells, measure=measure, table=frontier.table, figure=frontier.figure,
    picture="frontier.png", options=add_options, check=check, apart="condition",
    page=Page(
        "docs/study.md", markdown=True, arguments=frontier.arguments,
        note=lambda _: ": mean ± standard deviation over the seeds; seconds are the process's on a CPU's thread, "
        "or the wall's on a GPU and over rounds.",
    ),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
