"""`smi-fed invert` and `smi-fed show`."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from smi_fed import inversion
from smi_fed.checks import require
from smi_fed.cli.models import open_model
from smi_fed.cli.output import tell
from smi_fed.config import CONF, load_settings
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory
from smi_fed.inversion import InversionConfig, StopSchedule
from smi_fed.inversion.engine import trajectories
from smi_fed.inversion.flops import spent_flops, trajectory_flops
from smi_fed.models import Classifier
from smi_fed.progress import Bar, show_inversion
from smi_fed.report import plot_images
from smi_fed.sparse_images import SparseImages
from smi_fed.training import predict

Model = Annotated[str, typer.Argument(metavar="MODEL")]
Weights = Annotated[str, typer.Option(help="of a name or a spec: pretrained (default), random, or a file of weights")]
Classes = Annotated[int | None, typer.Option(help="number of classes, where the model does not tell")]
Size = Annotated[int | None, typer.Option(help="image size in pixels, where the model does not tell")]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Changes = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


def invert(
    model: Model,
    changes: Changes = None,
    output: Annotated[Path, typer.Option(help="where the images go; a picture of some lies beside them")] = Path(
        "images.safetensors"
    ),
    images: Annotated[int, typer.Option(min=1, help="how many")] = 16,
    classes: Annotated[str, typer.Option(help="such as 0,3,7; empty is all, in turn")] = "",
    method: Annotated[str, typer.Option(help="a file of conf/inversion: paper, dense, rebirth, ...")] = "paper",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Weights = "",
    num_classes: Classes = None,
    image_size: Size = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make synthetic images of what a model has learnt, spending time on its important patches alone.

    MODEL is a name of timm, a student's file, a .json of a model spec, or module:function. KEY=VALUE changes a setting
    of the method. A command that was stopped goes on where it was, to the same images.

    Example: smi-fed invert deit_tiny_patch16_224 --images 8 --classes 207,281 iterations=400
    """
    config = _settings(method, changes or [])
    where, _ = choose_device(device)
    require(output.suffix == ".safetensors", "--output", str(output), "a name that ends with .safetensors")
    writable_directory(output.absolute().parent)
    opened = open_model(model, weights, num_classes, image_size).to(where)
    targets = _targets(classes, trajectories(opened, config, images), opened.spec.num_classes)
    begin, spent, checkpoint = time.perf_counter(), dict[int, int](), output.with_suffix(".safetensors.checkpoint")
    with Bar(f"inversion of {Path(model).name}", config.iterations) as bar:

        def told(now: inversion.InversionProgress) -> None:
            spent.update(now.spent)
            show_inversion(bar, now)

        found = inversion.invert(
            opened, targets, config, generator=torch.Generator().manual_seed(seed), checkpoint=checkpoint, progress=told
        ).select(slice(images))
    found.save(output)
    shutil.rmtree(checkpoint, ignore_errors=True)
    drawn = _draw(found, output.with_suffix(".png"), Path(model).name, _names(opened))
    tell(_measured(opened, found, config, spent, len(targets)) | {
        "seconds": time.perf_counter() - begin, "file": str(output), "picture": str(drawn),
    }, as_json)  # fmt: skip


def _settings(method: str, changes: list[str]) -> InversionConfig:
    """The method's file with changes; a prior that needs a client's statistics is off unless it is asked for."""
    config = load_settings(CONF, [f"inversion={method}", *(f"inversion.{each}" for each in changes)]).inversion
    return config if any(each.startswith("statistics=") for each in changes) else replace(config, statistics=0.0)


def _targets(classes: str, count: int, known: int) -> Tensor:
    """So many, the asked classes in turn."""
    try:
        asked = [int(each) for each in classes.split(",")] if classes else list(range(known))
    except ValueError:
        asked = [-1]
    require(all(0 <= each < known for each in asked), "classes", classes, f"ints from 0 to {known - 1}, with commas")
    return torch.tensor([asked[place % len(asked)] for place in range(count)])


def _measured(
    model: Classifier, found: SparseImages, config: InversionConfig, spent: dict[int, int], targets: int
) -> dict[str, object]:
    """What the images are worth to their model, and what they took."""
    said = predict(model, found.images).softmax(1)[torch.arange(len(found)), found.targets]
    flops = spent_flops(model, config, spent, targets)
    dense = len(found) * trajectory_flops(model, replace(config, schedule=StopSchedule()))
    return {
        "images": len(found), "kept_fraction": found.kept_fraction, "flops": flops, "flops_of_dense": flops / dense,
        "certainty_of_target": float(said.mean()),
    }  # fmt: skip


def _names(model: Classifier) -> list[str]:
    return list(model.spec.class_names or map(str, range(model.spec.num_classes)))


def _draw(found: SparseImages, path: Path, title: str, names: list[str], count: int = 12) -> Path:
    plot_images(path, [found], [title], names, min(count, len(found)))
    return path


def show(
    file: Annotated[Path, typer.Argument(help="images that invert wrote")],
    output: Annotated[Path | None, typer.Option(help="the picture; beside the images by default")] = None,
    count: Annotated[int, typer.Option(min=1, help="images in the picture, of as many classes as there are")] = 12,
    as_json: AsJson = False,
) -> None:
    """Draw images, and below them the patches that were kept.

    Example: smi-fed show images.safetensors --count 20
    """
    found = SparseImages.load(file)
    hard = found.targets.ndim == 1
    names = [str(each) for each in range(int(found.targets.max()) + 1 if hard else 0)]
    drawn = _draw(found, output or file.with_suffix(".png"), file.name, names, count)
    tell({
        "images": len(found), "size": list(found.images.shape[1:]), "patches": list(found.grid),
        "kept_fraction": found.kept_fraction,
        "classes": sorted(set(found.targets.tolist())) if hard else None, "picture": str(drawn),
    }, as_json)  # fmt: skip
