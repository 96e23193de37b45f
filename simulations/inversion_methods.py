"""Every method against every other: `python -m simulations.inversion_methods [--seeds 0 1 2] [OVERRIDE ...]`.

For each data set (digits, shapes) and setting (one teacher, a federation of four) the same
trained clients are inverted by each method at several iteration budgets, and a student is
distilled from the images, as many for each method. Noise and the clients' own images stand
beside them. Every piece is one JSON line, written when it is done; a study that was stopped
goes on where it was. The picture is student accuracy against inversion seconds.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clients.app import own_images
from simulations import methods_report
from simulations.ledger import append_line, read_lines
from simulations.local_clients import digest, trained_clients
from simulations.methods_report import CONTROLS
from simulations.superlink import PROJECT
from smi_fed.checks import SettingError
from smi_fed.config import Settings, load_settings
from smi_fed.data import ImageSet, load_images
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory
from smi_fed.inversion import SparseImages
from smi_fed.models import build_seeded
from smi_fed.pipeline import (
    PipelineConfig,
    TrainedTeacher,
    distill_student,
    draw_targets,
    ensemble_accuracy,
    invert_teacher,
    seeded,
)
from smi_fed.progress import show_log
from smi_fed.training import accuracy

log = logging.getLogger("smi_fed")

DATA: dict[str, tuple[str, ...]] = {"digits": (), "shapes": ("inversion.parametrisation.levels=[4,8,16]",)}
"""Data sets, and what each needs of the inversion: shapes have detail that 8 x 8 grids cannot show."""

SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {"one": (1, ()), "four": (4, ("server.images_per_teacher=100",))}
"""Number of clients, and what their number changes: four times 100 images are enough to compare."""


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        overrides: what it changes of conf/experiment/methods.yaml.
        images: how many times as many images as the others have. Rebirth has three stops, so
            that with 4 it has as many trajectories as others have images.
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


def main(arguments: list[str] | None = None) -> int:
    """Run all pieces that are missing, then draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--budgets", type=int, nargs="+", default=[20, 40], help="iterations per image")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *CONTROLS], default=[*METHODS, *CONTROLS])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    show_log()
    try:
        output = writable_directory(options.output)
        for seed in options.seeds:
            for data in options.data:
                for setting in options.settings:
                    Study(seed, data, setting, options.overrides, output).run(options.methods, options.budgets)
    except (SettingError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    lines = list(read_lines(output / "pieces.jsonl").values())
    methods_report.print_tables(lines)
    methods_report.draw(lines, output / "methods.png")
    print(f"artefacts: {output}")
    return 0


class Study:
    """All pieces of one seed, data set and setting."""

    def __init__(self, seed: int, data: str, setting: str, overrides: list[str], output: Path) -> None:
        self.seed, self.data, self.setting, self.output = seed, data, setting, output
        self.overrides = [
            f"seed={seed}",
            f"data={data}",
            f"model={data}",
            *DATA[data],
            *SETTINGS[setting][1],
            *overrides,
        ]
        self.settings = self.configured(())
        self.device, reason = choose_device(self.settings.server.device)
        if self.settings.server.threads:
            torch.set_num_threads(self.settings.server.threads)
        log.info("seed %d, %s, %s, device: %s (%s)", seed, data, setting, self.device, reason)
        self.teachers: list[TrainedTeacher] = []

    def configured(self, overrides: tuple[str, ...]) -> Settings:
        """The study's settings with a method's own."""
        return load_settings(PROJECT / "conf", ["experiment=methods", *self.overrides, *overrides])

    def run(self, methods: list[str], budgets: list[int]) -> None:
        """Every piece that the ledger does not have; methods alternate within a budget."""
        ledger = self.output / "pieces.jsonl"
        known = read_lines(ledger)
        pieces = [(name, 0) for name in methods if name in CONTROLS]
        pieces += [(name, budget) for budget in budgets for name in methods if name not in CONTROLS]
        for name, budget in pieces:
            settings = self.configured(METHODS[name].overrides if name in METHODS else ())
            key = digest(settings, name, budget, self.setting, str(self.device), torch.__version__)
            if key not in known:
                append_line(ledger, {"key": key, **self.piece(settings, name, budget)})

    def trained(self) -> list[TrainedTeacher]:
        """The clients of this seed, data set and setting, trained once."""
        if not self.teachers:
            self.teachers = trained_clients(self.settings, SETTINGS[self.setting][0], self.output / "clients")
            for teacher in self.teachers:
                teacher.model.to(self.device)
        return self.teachers

    def piece(self, settings: Settings, name: str, iterations: int) -> dict[str, Any]:
        """One student from one method at one budget."""
        log.info("seed %d, %s, %s: %s, %d iterations", self.seed, self.data, self.setting, name, iterations)
        self.trained()
        _, test = load_images(settings.data)
        if name in CONTROLS:
            images, seconds, flops = list(self.controls(name)), 0.0, 0
        else:
            images, seconds, flops = self.inverted(settings, METHODS[name], iterations)
        student = build_seeded(settings.model.student, self.seed).to(self.device)
        distill_student(student, self.teachers, images, settings.distillation, seeded(self.seed, 1, len(self.teachers)))
        return {
            "seed": self.seed,
            "data": self.data,
            "setting": self.setting,
            "method": name,
            "iterations": iterations,
            "images": sum(map(len, images)),
            "inversion_seconds": seconds,
            "flops": flops,
            "kept_fraction": sum(each.kept_fraction * len(each) for each in images) / sum(map(len, images)),
            "student_test_accuracy": accuracy(student, test),
            "ensemble_test_accuracy": ensemble_accuracy(self.teachers, settings.distillation.ensemble, test),
            "device": str(self.device),
        }

    def clock(self) -> float:
        """Seconds of this process's work: on a CPU those that it had, whatever else the machine does."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def inverted(self, settings: Settings, method: Method, iterations: int) -> tuple[list[SparseImages], float, int]:
        """Images of every teacher, their seconds and their FLOPs."""
        inversion = settings.inversion.scaled(iterations)
        pipeline = PipelineConfig(settings.server.images_per_teacher * method.images, inversion, settings.distillation)
        found = [
            invert_teacher(t, i, pipeline, seeded(self.seed, 1, i), clock=self.clock)
            for i, t in enumerate(self.teachers)
        ]
        records = [record for _, record in found]
        return [images for images, _ in found], sum(r.seconds for r in records), sum(r.flops for r in records)

    def controls(self, name: str) -> Iterator[SparseImages]:
        """As many images of each client without inversion: uniform noise, or its own (which a federation never has)."""
        for number, teacher in enumerate(self.teachers):
            generator = seeded(self.seed, 1, number)
            targets = draw_targets(teacher, self.settings.server.images_per_teacher, generator)
            size = (len(targets), len(teacher.model.mean), *teacher.model.image_size)
            pixels = torch.rand(size, generator=generator)
            if name == "real":
                own = own_images(self.settings, number, len(self.teachers), teacher.model.spec)
                pixels = torch.stack([_one_of(own, int(target), generator) for target in targets])
            whole = torch.ones(len(targets), 1, 1, dtype=torch.bool)
            yield SparseImages(
                pixels, whole, targets, teacher.model.image_size, torch.arange(len(targets)),
                torch.full_like(targets, number), torch.where(whole, -1, 0),
            )  # fmt: skip


def _one_of(images: ImageSet, label: int, generator: torch.Generator) -> torch.Tensor:
    rows = (images.labels == label).nonzero()[:, 0]
    return images.images[rows[torch.randint(len(rows), (), generator=generator)]]


if __name__ == "__main__":
    sys.exit(main())
