"""Where the images of a study of one small teacher come from: several inversions, noise, and its own images."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from simulations.convergence import REBIRTH, SMOKE
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Lines

ITERATIONS, STOP, IMAGES = 40, "5:0.77", 400
RATE = 0.1
"""Of 0.1 and 0.4 that with which dense images of the five shapes taught more on seed 100; no other study tried it."""

SOURCES: dict[str, tuple[str, ...]] = {
    "dense": ("inversion=dense", "inversion.schedule=''"),
    "attention": ("inversion.selection=attention",),
    "random": ("inversion.selection=random",),
    "rebirth at random": (*REBIRTH, "inversion.selection=random"),
    **dict.fromkeys(CONTROLS, ()),
}
ONE_TEACHER = (
    "experiment=convergence", "data=shapes", "model=outlines", "data.scheme=iid", "evaluation=none",
    "inversion.parametrisation.levels=[4,8,16]",
)  # fmt: skip
"""Words of a study whose teacher and student are those of conf/model/outlines.yaml."""


def of_both(*keys: str) -> tuple[str, ...]:
    """Words that set keys of the teacher's and of the student's model."""
    return tuple(f"model.{each}.{key}" for each in ("student", "clients.vit_p4_w64_d2") for key in keys)


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each source of images."""
    return [
        Cell(
            {"source": source, "smoke": options.smoke},
            SOURCES[source],
            (f"server.images_per_teacher={IMAGES}", f"inversion.iterations={ITERATIONS}",
             f"inversion.schedule='{STOP}'", f"inversion.learning_rate={RATE}",
             *(SMOKE if options.smoke else ())),
        )
        for source in options.sources
    ]  # fmt: skip


def note(_: Lines) -> str:
    """What stands behind the command on a page."""
    return ": mean ± standard deviation over the seeds; seconds of the process, on one thread."
