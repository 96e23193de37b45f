"""How many teachers have to be asked of an image? `python -m simulations.asking [--seeds 0 1 2] [OVERRIDE ...]`.

Sixteen clients with digits (conf/experiment/asking.yaml) are trained and inverted once for each
seed. Then a student is distilled for each number of others that are asked of an image beside
its own teachers, and one that asks all of every image.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from simulations.local_clients import check_clients, kept_images, trained_clients
from simulations.methods import clock
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.models import build_seeded
from smi_fed.pipeline import distill_student, seeded
from smi_fed.training import accuracy

CLIENTS, ALL = 16, "all"
WORDS = ("experiment=asking",)


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--others", type=int, nargs="+", default=[7, 3], help="teachers beside an image's own")


def cells(options: Namespace) -> list[Cell]:
    """One for each number, and one for all."""
    numbers: list[Any] = [ALL, *options.others]
    return [Cell({"others": each}, (f"distillation.others={'null' if each == ALL else each}",), ()) for each in numbers]


def measure(settings: Settings, cell: Cell) -> Line:
    """One student."""
    teachers = trained_clients(settings, CLIENTS, cell.output / "clients")
    images = [kept_images(settings, n, teacher, cell.output / "images") for n, teacher in enumerate(teachers)]
    student = build_seeded(settings.model.student, settings.seed).to(cell.device)
    begin = clock(cell.device)
    distill_student(student, teachers, images, settings.distillation, seeded(settings.seed, 1, CLIENTS))
    seconds = clock(cell.device) - begin
    return {"accuracy": accuracy(student, load_images(settings.data)[1]), "distillation_seconds": seconds}


def table(lines: Lines) -> list[Table]:
    """Accuracy and seconds by the number of others, and how far from asking all."""
    rows, every = [["others", "student, %: mean", "each seed", "less than all, points", "seconds, median"]], {}
    for others in dict.fromkeys([ALL, *sorted((line["others"] for line in lines), key=str)]):
        own = sorted((line for line in lines if line["others"] == others), key=lambda line: line["seed"])
        scores = {line["seed"]: 100 * line["accuracy"] for line in own}
        every = scores if others == ALL else every
        if own:
            lost = [every[seed] - value for seed, value in scores.items() if seed in every]
            seconds = statistics.median(line["distillation_seconds"] for line in own)
            rows.append([
                str(others), f"{statistics.fmean(scores.values()):.1f}",
                ", ".join(f"{value:.1f}" for value in scores.values()),
                "" if others == ALL or not lost else f"{statistics.fmean(lost):.1f}", f"{seconds:.0f}",
            ])  # fmt: skip
    return [Table(f"{CLIENTS} clients, seeds {seeds_of(lines)}", rows)]


STUDY = Study(
    name="asking", about=__doc__, cells=cells, measure=measure, table=table, in_turn="others",
    page=Page("docs/many-clients.md", "Raw pieces", lambda _: ", CPU."), words=WORDS, options=add_options,
    check=check_clients,
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
