"""A run's report and pictures, from what its rounds did."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smi_fed import __version__, report
from smi_fed.config import Settings
from smi_fed.data import ImageSet
from smi_fed.inversion import SparseImages
from smi_fed.models import Classifier, count_parameters
from smi_fed.pipeline import TrainedTeacher, ensemble_accuracy
from smi_fed.strategies import RoundRecord
from smi_fed.strategies.admission import Verdict
from smi_fed.strategies.round_record import describe
from smi_fed.training import accuracy


def build(
    settings: Settings,
    records: Sequence[RoundRecord],
    scores: Sequence[dict[str, Any]],
    student: Classifier,
    test: ImageSet,
    device: str,
    total: float,
) -> dict[str, Any]:
    """report.json; without `records` (a strategy that ran by itself) it has no ensemble and no inversion."""
    seconds = _seconds(records, scores, total)
    found: dict[str, Any] = {
        "schema": report.SCHEMA_VERSION,
        "status": "completed",
        "seed": settings.seed,
        "device": device,
        "versions": versions(),
        "strategy": settings.strategy.name,
        "seconds": seconds,
        "clients": [],
        "ensemble": None,
        "student": {
            "architecture": describe(settings.model.student),
            "parameters": count_parameters(student),
            "test_accuracy": scores[-1]["student_test_accuracy"],
        },
        "inversion": None,
        "distillation": None,
        "rounds": list(scores),
    }
    if records:
        last, kind = records[-1], settings.distillation.ensemble
        found["clients"] = [_client(verdict, test) for verdict in last.verdicts]
        found["ensemble"] = {"weights": kind, "test_accuracy": ensemble_accuracy(last.teachers, kind, test)}
        found["inversion"] = _inversion(settings, last, seconds["inversion"])
        found["distillation"] = {"steps": last.distillation.steps, "seconds": seconds["distillation"]}
        found["pool"] = {"reused": last.reused}
    return found


def _seconds(records: Sequence[RoundRecord], scores: Sequence[dict[str, Any]], total: float) -> dict[str, float]:
    return {
        "train": max(0.0, scores[-1]["seconds"] - sum(each.seconds for each in records)),
        "inversion": sum(record.seconds for each in records for record in each.inversions),
        "distillation": sum(each.distillation.seconds for each in records),
        "total": total,
    }


def _client(verdict: Verdict, test: ImageSet) -> dict[str, Any]:
    teacher = verdict.teacher
    return {
        "node": str(verdict.node),  # 64-bit ids do not survive JSON numbers
        "name": teacher.name if teacher else f"node {verdict.node}",
        "architecture": verdict.architecture,
        "num_examples": verdict.num_examples,
        "test_accuracy": accuracy(teacher.aligned, test) if teacher else None,
        "admitted": verdict.admitted,
        "reason": verdict.reason,
    }


def _inversion(settings: Settings, last: RoundRecord, seconds: float) -> dict[str, Any]:
    config = settings.inversion
    kept = sum(float(each.mask.float().mean()) * len(each) for each in last.images)
    return {
        "method": config.summary,
        "images": sum(map(len, last.images)),
        "iterations": config.iterations,
        "seconds": seconds,
        "kept_fraction": kept / sum(map(len, last.images)),
        "flops": sum(each.flops for each in last.inversions),
        "dense_flops": sum(each.dense_flops for each in last.inversions),
    }


def draw(output: Path, last: RoundRecord, finished: dict[str, Any], class_names: Sequence[str]) -> None:
    """curves.png and synthetic.png."""
    accuracy_of_ensemble = finished["ensemble"]["test_accuracy"]
    report.plot_curves(
        output / "curves.png", last.distillation.losses, finished["rounds"], finished["clients"], accuracy_of_ensemble
    )
    names = [teacher.name for teacher in last.teachers]
    images = [_in_students_classes(each, t) for each, t in zip(last.images, last.teachers, strict=True)]
    report.plot_images(output / "synthetic.png", images, names, class_names)


def _in_students_classes(images: SparseImages, teacher: TrainedTeacher) -> SparseImages:
    if teacher.classes is None or images.targets.ndim != 1:
        return images
    return replace(images, targets=torch.tensor(teacher.classes)[images.targets])


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("flwr", "torch", "timm", "numpy")
    return {"smi-fed": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
