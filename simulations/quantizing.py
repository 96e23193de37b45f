"""What to calibrate a quantized model on? `python -m simulations.quantizing [--models dinov2 deit] [--seeds 0 1 2]`.

A model is quantized after its training to several widths of weights and activations, each time
with as many images to calibrate on: synthetic ones (sparse, dense, rebirth), noise (the floor) or
pictures of its training set (the ceiling). `dinov2` is DINOv2 ViT-S, fine-tuned on the pictures that
`make real-data` makes, all four styles together; `deit` is a small model of DeiT's shape, trained from
scratch on shapes. Inversion knows the model alone, no feature statistics of its data. The line has the
accuracy on held-out pictures, before and after, and how often both models say the same. Integers are
simulated, on `server.device`; calibration is on the CPU.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from clients.app import own_images
from simulations import owners
from simulations.latest import Latest
from simulations.local_clients import check_clients
from simulations.methods import clients_on, invert_all
from simulations.methods.report import spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.runner.ledger import digest
from smi_fed.checks import require
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.models import Classifier
from smi_fed.pipeline import TrainedTeacher, seeded
from smi_fed.quantization import Bits, quantize
from smi_fed.training import predict

MODELS: dict[str, tuple[str, ...]] = {
    "dinov2": ("experiment=real", "data=real_labels"),
    "deit": ("experiment=convergence", "model=deit", "data=shapes", "inversion.parametrisation.levels=[4,8,16]"),
}
BITS = ("w8a8", "w4a8", "w4a4")
SPARSE = ("inversion=attention", "inversion.selection=attention")
SOURCES: dict[str, tuple[str, ...]] = {
    "sparse": SPARSE,
    "dense": ("inversion=dense", "inversion.selection=random"),
    "rebirth": ("inversion=rebirth", "inversion.selection=random"),
    "noise": (),
    "real": (),
}
SYNTHETIC = ("sparse", "dense", "rebirth")
IMAGES, ITERATIONS = 32, 100
"""As many images as PSAQ-ViT calibrates on, and iterations of their inversion."""

SHARES = (0.25, 0.33, 0.5)
"""Of the patches that are left, what stops (or detaches) after each quarter of the iterations."""


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--images", type=int, default=IMAGES, help="to calibrate on")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of an inversion")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Every model with every source at every width; cells of the same images stand together."""
    images, iterations = (4, 4) if options.smoke else (options.images, options.iterations)
    shared = (
        f"server.images_per_teacher={images}", "inversion.statistics=0.0", f"inversion.iterations={iterations}",
        *(("client.training.steps=20",) if options.smoke else ()),
    )  # fmt: skip
    return [
        Cell(
            {"model": model, "bits": bits, "source": source, "images": images, "iterations": iterations,
             "smoke": options.smoke},
            (*SOURCES[source], *shared, f"inversion.schedule='{schedule(source, iterations)}'"),
            MODELS[model],
        )
        for model in options.models
        for source in options.sources
        for bits in options.bits
    ]  # fmt: skip


def schedule(source: str, iterations: int) -> str:
    """When which share of the patches stops; dense has no stop."""
    stops = [f"{(number + 1) * iterations // 4}:{share}" for number, share in enumerate(SHARES)]
    return "" if source == "dense" else ",".join(stops)


@dataclass(frozen=True)
class Trained:
    """A trained model, what it was trained on, and what it says of the held-out pictures `test`, (pictures,)."""

    teacher: TrainedTeacher
    train: ImageSet
    test: ImageSet
    said: Tensor

    @property
    def model(self) -> Classifier:
        """The trained one."""
        return self.teacher.model


def measure(settings: Settings, cell: Cell) -> Line:
    """One quantized model."""
    trained = trained_of(settings, cell)
    images, seconds = images_of(settings, cell, trained)
    made = quantize(trained.model, images, Bits.parse(cell["bits"]))
    said = predict(made, trained.test.images).argmax(1)
    return {
        "accuracy": share(said == trained.test.labels), "float_accuracy": share(trained.said == trained.test.labels),
        "agreement": share(said == trained.said), "inversion_seconds": seconds, "calibrated_on": len(images),
        "test_images": len(said),
    }  # fmt: skip


def share(right: Tensor) -> float:
    """How many of these are true, in [0, 1]."""
    return float(right.float().mean())


def trained_of(settings: Settings, cell: Cell) -> Trained:
    """The model of a cell, kept in memory while cells ask for the same one, and on disk."""
    key = digest(settings.seed, settings.model, settings.data, settings.client, cell.device, cell.output)

    def trained() -> Trained:
        (teacher,) = clients_on(settings, cell, 1)
        train, test = own_images(settings, 0, 1, teacher.model.spec), load_images(settings.data)[1]
        return Trained(teacher, train, test, predict(teacher.model, test.images).argmax(1))

    return _TRAINED.of(key, trained)


_TRAINED = Latest[Trained]()


def images_of(settings: Settings, cell: Cell, trained: Trained) -> tuple[Tensor, float]:
    """Images (n, c, h, w) in [0, 1] of the cell's source, and how many seconds their inversion took.

    Kept in memory while cells ask for the same ones.
    """
    key = digest(settings.seed, trained.teacher.digest, settings.inversion, cell["source"], cell["images"])

    def made() -> tuple[Tensor, float]:
        if cell["source"] not in SYNTHETIC:
            return without_inversion(cell["source"], trained, cell["images"], seeded(settings.seed, 1, 0)), 0.0
        (found,), told = invert_all(settings, [trained.teacher], cell["iterations"], 1, cell.device)
        return found.images, told["inversion_seconds"]

    return _IMAGES.of(key, made)


_IMAGES = Latest[tuple[Tensor, float]]()


def without_inversion(source: str, trained: Trained, count: int, generator: torch.Generator) -> Tensor:
    """Pictures that the model was trained on ("real"), or Gaussian noise of the mean and spread that it expects."""
    if source == "real":
        return trained.train.images[torch.randperm(len(trained.train), generator=generator)[:count]]
    model = trained.model
    noise = torch.randn(count, len(model.mean), *model.image_size, generator=generator)
    return (model.mean.cpu() + model.std.cpu() * noise).clamp(0, 1)


def check(settings: Settings, cell: Cell) -> None:
    """Raise SettingError for widths that cannot be, and for data, models or packages that are not there."""
    Bits.parse(cell["bits"])
    require(find_spec("torchao") is not None, "quantizing", "no torchao", "pip install 'smi-fed[quantize]'")
    require(cell["images"] >= 2, "--images", cell["images"], "an int >= 2")
    (owners.check if cell["model"] == "dinov2" else check_clients)(settings, cell)


def table(lines: Lines) -> list[Table]:
    """Accuracy, agreement with the float model, and seconds of inversion: a column for each source."""
    sources = [name for name in SOURCES if any(line["source"] == name for line in lines)]
    accuracy, agreement = [["accuracy, %", "float", *sources]], [["same answer as float, %", *sources]]
    for model, bits in dict.fromkeys((line["model"], line["bits"]) for line in lines):
        own = [line for line in lines if (line["model"], line["bits"]) == (model, bits)]
        accuracy.append([f"{model} {bits}", _float(own), *(_percent(own, name, "accuracy") for name in sources)])
        agreement.append([f"{model} {bits}", *(_percent(own, name, "agreement") for name in sources)])
    seconds = [["seconds of inversion", *(name for name in sources if name in SYNTHETIC)]]
    inverted = seconds[0][1:]
    for model in dict.fromkeys(line["model"] for line in lines):
        seconds += [[model, *(_seconds(lines, model, name) for name in inverted)]]
    title = f"calibrated on {lines[-1]['images']} images, seeds {seeds_of(lines)}"
    return [Table(title, accuracy), Table(title, agreement), Table(title, seconds)]


def _float(own: Lines) -> str:
    return spread([100 * each for each in {line["seed"]: line["float_accuracy"] for line in own}.values()])


def _percent(own: Lines, source: str, what: str) -> str:
    return spread([100 * line[what] for line in own if line["source"] == source])


def _seconds(lines: Lines, model: str, source: str) -> str:
    """Mean over the seeds; cells of several widths share their images."""
    found = {line["seed"]: line["inversion_seconds"] for line in lines
             if (line["model"], line["source"]) == (model, source)}  # fmt: skip
    return f"{statistics.fmean(found.values()):.1f}" if found else "-"


def figure(lines: Lines) -> Any:
    """A panel for each model, a group of bars for each width, a bar for each source with its seeds as points."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line["model"] for line in lines))
    drawn = Figure(figsize=(6 * len(models), 4), layout="constrained")
    axes = drawn.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        own = [line for line in lines if line["model"] == model]
        widths = list(dict.fromkeys(line["bits"] for line in own))
        for place, source in enumerate(SOURCES):
            for group, bits in enumerate(widths):
                values = [100 * x["accuracy"] for x in own if (x["source"], x["bits"]) == (source, bits)]
                if values:
                    where = group + 0.16 * (place - 2)
                    named = source if bits == widths[0] else None
                    axis.bar(where, statistics.fmean(values), 0.14, color=f"C{place}", alpha=0.7, label=named)
                    axis.plot([where] * len(values), values, "k.", markersize=3)
        reference = statistics.fmean(100 * line["float_accuracy"] for line in own)
        axis.axhline(reference, color="black", linestyle="--", linewidth=1, label="float")
        axis.set(title=f"{model}, seeds {seeds_of(own)}", ylabel="accuracy in %", ylim=(0, 100))
        axis.set_xticks(range(len(widths)), widths)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return drawn


STUDY = Study(
    name="quantizing", about=__doc__, cells=cells, measure=measure, table=table, figure=figure,
    picture="quantizing.png", options=add_options, check=check, in_turn="", apart="model",
    page=Page(
        "docs/library.md", markdown=True,
        note=lambda _: ": held-out pictures, mean ± standard deviation over the seeds; seconds are on the device of "
        "the lines.",
    ),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
