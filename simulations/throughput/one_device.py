"""A federation's server side on one device: four different models in, one student out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from simulations.throughput.measuring import peak_bytes, random_model, synchronise
from smi_fed.checks import Allowed, Count, Natural, checked
from smi_fed.distillation import DistillationConfig
from smi_fed.inversion import InversionConfig, SparseImages
from smi_fed.models import Classifier
from smi_fed.pipeline import (
    InversionRecord,
    PipelineConfig,
    TrainedTeacher,
    distill_student,
    invert_teacher,
    seeded,
)
from smi_fed.scores import ensemble_classes
from smi_fed.training import predict

ARCHITECTURES = ("deit_tiny_patch16_224", "deit_small_patch16_224") * 2
STUDENT = "deit_tiny_patch16_224"
CLASSES = 10
TEST_IMAGES = 64


@checked
class FederationConfig:
    """Settings of the one-device federation.

    Args:
        images: synthetic images of each of the four teachers; 0 leaves the federation out.
        iterations: of each inversion, under the paper's schedule in proportion.
        steps: of distillation.
    """

    images: Natural = 8
    iterations: Annotated[int, Field(strict=True, ge=8), Allowed("an int >= 8")] = 40
    steps: Count = 5


def federation(config: FederationConfig, inversion: InversionConfig, device: torch.device, seed: int) -> dict[str, Any]:
    """Seconds of inversion and distillation for four models at 224 px with random weights.

    The student's agreement with the ensemble is over generated images of low frequency.
    """
    inversion = inversion.scaled(config.iterations)
    batch = min(64, config.images * len(ARCHITECTURES))
    pipeline = PipelineConfig(config.images, inversion, DistillationConfig(steps=config.steps, batch_size=batch))
    torch.manual_seed(seed)
    teachers = [
        TrainedTeacher(f"{number} {name}", random_model(name, device, CLASSES), 100 * (number + 1))
        for number, name in enumerate(ARCHITECTURES)
    ]
    student = random_model(STUDENT, device, CLASSES)
    test = smooth_images(TEST_IMAGES, 224, seeded(seed, 2))
    before = agreement(student, teachers, test)
    pairs: list[tuple[SparseImages, InversionRecord]] = []

    def invert_all() -> None:
        pairs.extend(invert_teacher(t, i, pipeline, seeded(seed, 0, i)) for i, t in enumerate(teachers))

    # Not on CPU: the profiler's own memory would grow with the minutes.
    peak = peak_bytes(invert_all, device) if device.type == "cuda" else invert_all()
    synchronise(device)
    started = time.perf_counter()
    distilled = replace(pipeline.distillation, ensemble="examples")
    distill_student(student, teachers, [images for images, _ in pairs], distilled, seeded(seed, 1))
    synchronise(device)
    distillation = time.perf_counter() - started
    inversions = [record.seconds for _, record in pairs]
    return {
        "teachers": list(ARCHITECTURES),
        "student": STUDENT,
        "images": config.images * len(teachers),
        "iterations": config.iterations,
        "schedule": str(inversion.schedule),
        "distillation_steps": config.steps,
        "inversion_seconds": inversions,
        "distillation_seconds": distillation,
        "total_seconds": sum(inversions) + distillation,
        "images_per_second": config.images * len(teachers) / sum(inversions),
        "inversion_peak_bytes": peak,
        "student_agrees_with_ensemble": {"before": before, "after": agreement(student, teachers, test)},
    }


def smooth_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Generated images (count, 3, size, size) in [0, 1]: random grids of three sizes, upsampled and added."""
    grids = [torch.randn(count, 3, side, side, generator=generator) for side in (4, 8, 32)]
    layers = [F.interpolate(grid, (size, size), mode="bilinear", align_corners=False) for grid in grids]
    return torch.stack(layers).sum(0).sigmoid()


def agreement(student: Classifier, teachers: list[TrainedTeacher], images: Tensor) -> float:
    """Share of images that the student names as the ensemble does."""
    named = ensemble_classes(teachers, "examples", images)
    return float((predict(student, images).argmax(1) == named).float().mean())
