"""What would very many large clients take? `python -m simulations.projection [KEY=VALUE ...]`.

Arithmetic, not a measurement: FLOPs are counted on models without weights, and everything else is
an assumption that the table tells and that the command line changes, such as `clients=1000
accelerators=1`. It writes nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simulations.runner import Table, publication
from smi_fed.checks import Count, Positive, SettingError, Text, checked, read
from smi_fed.distillation.loop import BLOCK_BYTES
from smi_fed.inversion import InversionConfig
from smi_fed.inversion.flops import trajectory_flops
from smi_fed.models import Classifier, ModelSpec, build_model


@checked
class Assumptions:
    """What is not counted.

    Args:
        clients: each sends one model, once.
        model: of every client and of the student, by timm's name.
        classes: that it tells apart.
        trajectories: inversions of each teacher; rebirth makes `images` of them.
        images: synthetic images of each teacher.
        iterations, schedule: of an inversion.
        passes: how often the student sees each image.
        batch: views of a step.
        others: teachers that are asked of an image beside its own.
        bytes_per_weight: on the wire, on disk and in memory.
        rate: FLOP/s that an accelerator sustains, in inversion and distillation alike.
        accelerators: that invert and answer side by side; the student has one of them.
        link: bytes/s into the server.
        disk: bytes/s from the disk that holds models and images.
    """

    clients: Count = 10_000
    model: Text = "deit_base_patch16_224"
    classes: Count = 1000
    trajectories: Count = 90
    images: Count = 360
    iterations: Count = 20
    schedule: str = "5:0.25,10:0.33,15:0.5"
    passes: Count = 10
    batch: Count = 64
    others: Count = 7
    bytes_per_weight: Count = 4
    rate: Positive = 1.5e14
    accelerators: Count = 8
    link: Positive = 1.25e9
    disk: Positive = 3e9


class Sizes(NamedTuple):
    """Of one model: weights, FLOPs of a forward pass and of an inversion, and pixels of an image."""

    weights: int
    forward: int
    trajectory: int
    numbers: int


def sizes(assumed: Assumptions) -> Sizes:
    """Counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = build_model(ModelSpec(assumed.model, num_classes=assumed.classes, kwargs={}))
    config = InversionConfig.paper(iterations=assumed.iterations, schedule=assumed.schedule)
    numbers = 3 * math.prod(model.image_size)
    weights = sum(weight.numel() for weight in model.parameters())
    return Sizes(weights, _forward_flops(model), trajectory_flops(model, config), numbers)


def _forward_flops(model: nn.Module) -> int:
    assert isinstance(model, Classifier)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *model.image_size, device="meta"))
    return counter.get_total_flops()


class Part(NamedTuple):
    """Of the server's work: FLOPs, on how many accelerators, and bytes over the link or from the disk."""

    name: str
    flops: float = 0.0
    accelerators: int = 1
    bytes: float = 0.0
    per_second: float = 1.0


def parts(assumed: Assumptions, size: Sizes) -> list[Part]:
    """What the server does, and how the loading of teachers would be if each were loaded once."""
    a, model = assumed, assumed.bytes_per_weight * size.weights
    images, asked = a.clients * a.images, 1 + min(a.others, a.clients - 1)
    views, steps = a.passes * images, max(1, BLOCK_BYTES // (4 * size.numbers * a.batch))
    blocks = math.ceil(views / (steps * a.batch))
    loads = blocks * min(a.clients, asked * views / blocks)
    shown = 4.0 * images * size.numbers
    return [
        Part("models arrive", bytes=a.clients * model, per_second=a.link),
        Part("inversion", a.clients * a.trajectories * size.trajectory, a.accelerators),
        Part("student's steps", 3.0 * views * size.forward),
        Part("teachers answer every view, as it is built", views * asked * size.forward),
        Part("loading teachers, block by block as it is built", bytes=loads * model, per_second=a.disk),
        Part("teachers answer, if asked once of each image", images * asked * size.forward, a.accelerators),
        Part("loading teachers, if each were loaded once", bytes=a.clients * model, per_second=a.disk),
        Part("loading images for that, of each teacher asked", bytes=asked * shown, per_second=a.disk),
    ]


def tables(assumed: Assumptions) -> list[Table]:
    """The assumptions, and hours of each part."""
    size = sizes(assumed)
    known = [["assumed", ""], *([key, f"{value:g}" if isinstance(value, float) else str(value)]
                                for key, value in asdict(assumed).items())]  # fmt: skip
    counted = [["counted", ""], *([key, f"{value:.3g}"] for key, value in size._asdict().items())]
    rows = [["part", "FLOPs", "bytes", "hours"]]
    for part in parts(assumed, size):
        seconds = part.flops / assumed.rate / part.accelerators + part.bytes / part.per_second
        rows.append([part.name, *(f"{each:.2g}" if each else "" for each in (part.flops, part.bytes)),
                     f"{seconds / 3600:.3g}"])  # fmt: skip
    return [Table("What is assumed", known), Table("What is counted", counted), Table("What that takes", rows)]


def assumptions(words: Sequence[str]) -> Assumptions:
    """Those that stand here, with what is said otherwise.

    Raises:
        SettingError: naming what cannot be.
    """
    return read(Assumptions, OmegaConf.to_container(OmegaConf.from_dotlist(list(words))))


def section() -> str:
    """What docs/many-clients.md shows."""
    body = publication.as_printed(tables(Assumptions()))
    return f"{body}`python -m simulations.projection`: counted and assumed, not measured.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        publication.show(tables(assumptions(words)), Console(width=110))
    except (SettingError, ValueError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
