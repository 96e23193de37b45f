"""Where the images of a study of one teacher come from: several inversions, noise, and its own images."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from simulations import owners
from simulations.convergence import SMOKE
from simulations.local_clients import check_clients
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Line, Lines, asked, groups
from smi_fed.config import Settings
from smi_fed.inversion import StopSchedule


class Data(NamedTuple):
    """The teacher and student of one kind of data, and what an inversion is given."""

    words: tuple[str, ...]
    client: str  # the teacher's name in the configuration
    images: int  # of each source, that a student learns from
    iterations: int  # of each image


DATA: dict[str, Data] = {
    "shapes": Data(
        ("experiment=convergence", "data=shapes", "model=outlines", "data.scheme=iid", "evaluation=none",
         "inversion.parametrisation.levels=[4,8,16]"),
        "vit_p4_w64_d2", 400, 40,
    ),
    "real": Data(("experiment=real_teacher",), "vit_s", 100, 12),
}  # fmt: skip

STOP, REBORN = "5:0.77", "10:0.25,20:0.33,30:0.5"
PLANNED = 40
"""Iterations for which those stops are written; of fewer they come as much sooner."""

RATE = 0.1
"""Of 0.1 and 0.4 that with which dense images of the five shapes taught more on seed 100; untried on real pictures."""

SOURCES: dict[str, tuple[str, ...]] = {
    "dense": ("inversion=dense",),
    "attention": ("inversion.selection=attention",),
    "random": ("inversion.selection=random",),
    "rebirth at random": ("inversion=rebirth", "inversion.selection=random"),
    **dict.fromkeys(CONTROLS, ()),
}
STOPS = {"dense": "", "rebirth at random": REBORN}
"""Of sources that do not stop as `STOP` says."""


def of_both(client: str, *keys: str) -> tuple[str, ...]:
    """Words that set keys of the teacher's and of the student's model."""
    return tuple(f"model.{each}.{key}" for each in ("student", f"clients.{client}") for key in keys)


def inverted(data: str, images: int | None = None) -> tuple[str, ...]:
    """Words for the number of images, their iterations, rate and stops."""
    return (
        f"server.images_per_teacher={images or DATA[data].images}", f"inversion.iterations={DATA[data].iterations}",
        f"inversion.learning_rate={RATE}", stopping(data, STOP),
    )  # fmt: skip


def stopping(data: str, stops: str) -> str:
    """The word for stops that are written for `PLANNED` iterations."""
    return f"inversion.schedule='{StopSchedule.parse(stops).scaled(DATA[data].iterations / PLANNED)}'"


def options_of(words: Mapping[str, Sequence[str]]) -> Callable[[ArgumentParser], None]:
    """What of a study is measured, from the words of each kind of data."""

    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--data", nargs="+", choices=words, default=list(words))
        parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
        parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")

    return add


def cells_of(words: Mapping[str, Sequence[str]]) -> Callable[[Namespace], list[Cell]]:
    """Each source of images, from the study's own words of each kind of data."""

    def cells(options: Namespace) -> list[Cell]:
        return [
            Cell(
                {"data": data, "source": source, "smoke": options.smoke},
                (*SOURCES[source], *([stopping(data, STOPS[source])] if source in STOPS else [])),
                (*DATA[data].words, *words[data], *inverted(data), *(SMOKE if options.smoke else ())),
            )
            for data in options.data
            for source in options.sources
        ]  # fmt: skip

    return cells


def by_data(lines: Lines) -> dict[str, list[Line]]:
    """Lines by their data; those that do not tell are of shapes."""
    return {data: own for (data,), own in groups([{"data": "shapes", **line} for line in lines], "data").items()}


def check(settings: Settings, cell: Cell) -> None:
    """Raise SettingError for a teacher or student that cannot be, and where `make real-data` was not."""
    (owners.check if cell["data"] == "real" else check_clients)(settings, cell)


def told(option: str, factor: str) -> Callable[[Lines], str]:
    """What stands in a page's command: values of a factor that were measured, and the seeds."""

    def arguments(lines: Lines) -> str:
        values = dict.fromkeys(line.get(factor, "shapes") for line in lines)
        return f"{shlex.join([option, *values])} {asked(lines)}"

    return arguments


def note(_: Lines) -> str:
    """What stands behind the command on a page."""
    return ": mean ± standard deviation over the seeds; seconds of the process, on one thread."
