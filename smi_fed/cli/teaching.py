"""`smi-fed distill` and `smi-fed evaluate`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from smi_fed import distillation
from smi_fed.checks import require
from smi_fed.cli.inverting import AsJson, Changes, Classes, Device, Model, Size, Weights
from smi_fed.cli.models import open_model
from smi_fed.cli.output import tell
from smi_fed.config import CONF, load_settings
from smi_fed.data import DataConfig, ImageSet, load_images
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory
from smi_fed.models import Classifier, ModelSpec
from smi_fed.progress import Bar
from smi_fed.report import save_student
from smi_fed.scores import NEAR_CHANCE
from smi_fed.sparse_images import SparseImages
from smi_fed.training import predict

log = logging.getLogger("smi_fed")

PUBLISHED = {"deit_tiny_patch16_224": 0.722, "deit_small_patch16_224": 0.798, "deit_base_patch16_224": 0.818}
"""Accuracy of timm's weights on ImageNet-1k's validation images (Touvron et al., 2021), in [0, 1]."""

FAR = 0.05
"""Below a published accuracy; what images are resized like costs less."""


def distill(
    student: Annotated[str, typer.Argument(metavar="STUDENT")],
    changes: Changes = None,
    teacher: Annotated[list[str] | None, typer.Option(help="a model, as MODEL of invert; once for each")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="a file that invert wrote; once for each")] = None,
    output: Annotated[Path, typer.Option(help="where the student goes")] = Path("student.safetensors"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Annotated[str, typer.Option(help="the student's: random, pretrained, or a file of weights")] = "",
    teacher_weights: Annotated[str, typer.Option(help="of teachers that are names or specs")] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Teach a student what teachers say of synthetic images.

    STUDENT is as MODEL of invert; a .json of a spec says its size. KEY=VALUE changes a setting of the distillation.

    Example: smi-fed distill small.json --teacher deit_tiny_patch16_224 --images images.safetensors steps=300
    """
    require(bool(teacher and images), "--teacher and --images", None, "one of each at least")
    config = load_settings(
        CONF, ["distillation.ensemble=uniform", *(f"distillation.{each}" for each in changes or [])]
    ).distillation
    alone = config.ensemble in ("uniform", "certainty")
    require(alone, "ensemble", config.ensemble, "uniform | certainty: nobody tells of teachers' examples here")
    judged = config.robust.kind == "agreement"
    require(not judged, "robust", "agreement", "mean | median | trimmed: images are not told apart by teacher here")
    where, _ = choose_device(device)
    writable_directory(output.absolute().parent)
    sets = [SparseImages.load(path) for path in images or []]
    teachers = [open_model(each, teacher_weights).to(where) for each in teacher or []]
    says_it = Path(student).suffix in (".json", ".safetensors") or Path(student).is_file()
    known = None if says_it else teachers[0].spec.num_classes
    pupil = open_model(student, weights, known, seed=seed, otherwise="random")
    begin = time.perf_counter()
    with Bar("distillation", config.steps, unit="step") as bar:
        record = distillation.distill(
            pupil.to(where), teachers, sets, config, generator=torch.Generator().manual_seed(seed),
            progress=lambda step, loss: bar.at(step, loss=loss),
        )  # fmt: skip
    save_student(output, pupil)
    tell({
        "steps": record.steps, "loss": record.losses[-1] if record.losses else None,
        "seconds": time.perf_counter() - begin, "file": str(output),
    }, as_json)  # fmt: skip


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="digits | shapes | a directory, a folder of images a class")] = "digits",
    weights: Weights = "",
    num_classes: Classes = None,
    image_size: Size = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model on images: how often it is right, overall and for each class.

    MODEL is as that of invert. Of digits and shapes it is the test split; of a directory its test split, or a quarter
    where it has none.

    Example: smi-fed evaluate student.safetensors --data digits
    """
    where, _ = choose_device(device)
    opened = open_model(model, weights, num_classes, image_size).to(where)
    found = measured(opened, test_images(data, opened))
    warn_of(opened, found["accuracy"])
    tell(found, as_json)


def warn_of(model: Classifier, accuracy: float) -> None:
    """Warn of an accuracy in [0, 1] that is implausible: near chance, or far below the published one."""
    spec = model.spec
    usual = PUBLISHED.get(spec.name.partition(".")[0], 0.0) if spec.start and spec.num_classes == 1000 else 0.0
    why = "near chance" if accuracy < NEAR_CHANCE / spec.num_classes else ""
    if not why and accuracy < usual - FAR:
        why = f"far below the {100 * usual:.1f} % that are published for its weights"
    if why:
        log.warning("%s has %.1f %%, which is %s: is it the model for these images, with their order of classes, mean "
                    "and std?", spec.name, 100 * accuracy, why)  # fmt: skip


def measured(model: Classifier, test: ImageSet) -> dict[str, Any]:
    """How often a model is right on images."""
    right = predict(model, test.images).argmax(1) == test.labels
    by_class = {
        name: float(right[test.labels == place].float().mean())
        for place, name in enumerate(test.class_names)
        if bool((test.labels == place).any())
    }
    return {"images": len(test), "accuracy": float(right.float().mean()), "by_class": by_class}


def test_images(data: str, model: Classifier) -> ImageSet:
    """The images that a model of this spec is measured on."""
    spec: ModelSpec = model.spec
    embedded = data in ("digits", "shapes")
    require(embedded or Path(data).exists(), "--data", data, "digits | shapes | a directory that is there")
    config = DataConfig(
        source=data if embedded else "folder", name="" if embedded else str(Path(data).absolute()),
        image_size=model.image_size[0], channels=len(model.mean),
    )  # fmt: skip
    test = load_images(config)[1]
    if spec.class_names is not None and set(test.class_names) == set(spec.class_names):
        return test.of_classes(spec.class_names)
    require(embedded or spec.class_names is None, "--data", list(test.class_names), f"{list(spec.class_names or ())}")
    named = len(test.class_names) == spec.num_classes
    require(named, "--data", f"{data} with {len(test.class_names)} classes", f"one with {spec.num_classes}")
    return test
