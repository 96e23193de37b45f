"""A run's report and pictures, from what its rounds did."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from smi_fed import __version__, report
from smi_fed.alignment import align_targets
from smi_fed.config import ModelsConfig, Settings
from smi_fed.data import ImageSet
from smi_fed.lazy import Lazily
from smi_fed.models import Classifier, count_parameters
from smi_fed.scores import Score, scores_of
from smi_fed.starts import start_of, start_of_client
from smi_fed.strategies import RoundRecord
from smi_fed.strategies.round_record import Verdict, describe

log = logging.getLogger("smi_fed")

PICTURED = 16
"""Most teachers in synthetic.png; all images are in the directory of images."""

POINTS = 100
"""Most points of a curve of losses in report.json."""


def build(
    settings: Settings,
    records: Sequence[RoundRecord],
    scores: Sequence[dict[str, Any]],
    student: Classifier,
    test: ImageSet | None,
    device: str,
    total: float,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """report.json; without `records` (a strategy that ran by itself) it has no ensemble and no inversion.

    Without `test` every test accuracy is None.
    """
    found: dict[str, Any] = {
        "schema": report.SCHEMA_VERSION,
        "status": "completed",
        "seed": settings.seed,
        "device": device,
        "versions": versions(),
        "strategy": settings.strategy.name,
        "start": settings.strategy.start,
        "seconds": _seconds(records, scores, total),
        "clients": [],
        "ensemble": None,
        "student": {
            "architecture": describe(settings.model.student),
            "start": start_of(settings.model.student),
            "parameters": count_parameters(student),
            "test_accuracy": scores[-1]["student_test_accuracy"],
        },
        "finish": None,
        "inversion": None,
        "distillation": None,
        "rounds": [_brief(score) for score in scores],
        "evaluation": scores[-1]["evaluation"],
        "classes": list(class_names),
        "settings": plain(settings),
    }
    if records:
        last, kind = records[-1], settings.distillation.ensemble
        trained = settings.clients_train
        alone, together = list[Score](), None
        if trained and test is not None:
            robust = settings.distillation.robust
            alone, together = scores_of(last.teachers, kind, test, last.factors, robust)
        clients = _clients(last.verdicts, alone, trained)
        starts = [start_by_settings(each["architecture"], settings.model) if trained else None for each in clients]
        found["clients"] = [each | {"start": start} for each, start in zip(clients, starts, strict=True)]
        found["ensemble"] = {"weights": kind, "robust": settings.distillation.robust.kind, "test_accuracy": together}
        if settings.distills:
            found["inversion"] = {"method": settings.inversion.summary, "iterations": settings.inversion.iterations}
            found["inversion"] |= _inversions(records)
        found["distillation"] = _distillations(records)
        found["pool"] = {"reused": sum(record.reused for record in records)}
        found["rounds"] = [score | _round(record) for score, record in zip(found["rounds"], records, strict=True)]
    return found


def with_finish(found: dict[str, Any], finished: dict[str, Any]) -> dict[str, Any]:
    """A report whose student has its last head; what it was before stands with its round."""
    after = finished["after"]
    told = {key: finished[key] for key in ("head", "clients", "missing")}
    student = found["student"] | {"test_accuracy": after["student_test_accuracy"]}
    return found | {"student": student, "evaluation": after["evaluation"], "finish": told}


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them."""
    return TypeAdapter(Settings).dump_python(settings, mode="json", fallback=str)


def _brief(score: dict[str, Any]) -> dict[str, Any]:
    """A round's score; of what clients measured the mean and the worst, each client is told of for the last round."""
    measured = score["evaluation"]
    short = None if measured is None else {key: measured[key] for key in ("mean", "worst")}
    return {**score, "evaluation": short}


def _seconds(records: Sequence[RoundRecord], scores: Sequence[dict[str, Any]], total: float) -> dict[str, float]:
    """Seconds of all rounds; `train` is waiting for clients while the server had nothing to do."""
    return {
        "train": max(0.0, scores[-1]["seconds"] - sum(record.seconds for record in records)),
        "inversion": _inversions(records)["seconds"],
        "distillation": _distillations(records)["seconds"],
        "total": total,
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    """What one round spent and gave."""
    refused = [{"node": str(v.node), "name": v.name, "reason": v.reason} for v in record.verdicts if not v.admitted]
    return {
        "admitted": [verdict.called for verdict in record.admitted],
        "refused": refused,
        "doubted": [{"name": v.called, **asdict(v.opinion)} for v in record.verdicts if v.opinion.reason],
        "bytes": [{"node": str(v.node), "name": v.called, **_bytes(v)} for v in record.verdicts],
        "reused": record.reused,
        "server_seconds": record.seconds,
        "inversion": _inversions([record]),
        "distillation": _distillations([record]) | {"losses": _thinned(record.distillation.losses)},
    }


def _thinned(losses: Sequence[float]) -> list[list[float]]:
    """[step, loss] of at most `POINTS` steps, the last among them."""
    stride = -(-len(losses) // POINTS) or 1
    return [[step, losses[step - 1]] for step in range(len(losses), 0, -stride)][::-1]


def _inversions(records: Sequence[RoundRecord]) -> dict[str, Any]:
    """What the inversions of these rounds spent and gave together."""
    every = [inversion for record in records for inversion in record.inversions]
    images = sum(each.images for each in every)
    return {
        "images": images,
        "seconds": sum(each.seconds for each in every),
        "kept_fraction": sum(each.kept_fraction * each.images for each in every) / max(1, images),
        "flops": sum(each.flops for each in every),
        "dense_flops": sum(each.dense_flops for each in every),
    }


def _distillations(records: Sequence[RoundRecord]) -> dict[str, Any]:
    """What the distillations of these rounds took together, and which weights the last one kept."""
    return {
        "steps": sum(record.distillation.steps for record in records),
        "seconds": sum(record.distillation.seconds for record in records),
        "kept": records[-1].distillation.kept if records else None,
    }


def _clients(verdicts: Sequence[Verdict], alone: Sequence[Score], trained: bool = True) -> list[dict[str, Any]]:
    """Every node that was asked; a teacher that guesses, although it says otherwise, is warned of.

    Args:
        alone: a score for each teacher, or none where nothing was tested.
        trained: whether clients trained.
    """
    scores, lines = iter(alone), []
    for verdict in verdicts:
        teacher = verdict.teacher
        score = None if teacher is None else next(scores, None)
        name = verdict.called
        warning = "" if score is None else score.doubt(verdict.train_loss)
        if warning:
            log.warning("%s: %s", name, warning)
        lines.append({
            "node": str(verdict.node),  # 64-bit ids do not survive JSON numbers
            "name": name,
            "architecture": verdict.architecture,
            "num_examples": verdict.num_examples,
            "train_loss": verdict.train_loss if teacher and trained else None,
            "age": verdict.age,
            "test_accuracy": None if score is None else score.accuracy,
            "admitted": verdict.admitted,
            "reason": verdict.reason,
            "warning": warning,
            "agreement": verdict.opinion.agreement,
            "weight_factor": verdict.opinion.factor if teacher else None,
            "doubt": verdict.opinion.reason,
            "images": _where(verdict),
            **_bytes(verdict),
        })  # fmt: skip
    return lines


def _bytes(verdict: Verdict) -> dict[str, int]:
    """What went to a client in a round's training, and what came of it."""
    return {"bytes_to_client": verdict.sent, "bytes_from_client": verdict.received}


def _where(verdict: Verdict) -> dict[str, Any] | None:
    """A client's images in the directory of images, and its classes' places among the student's (null: the same)."""
    teacher, images = verdict.teacher, verdict.images
    if teacher is None or images is None:
        return None
    return {"file": images.path.name, "classes": None if teacher.classes is None else list(teacher.classes)}


def start_by_settings(architecture: str, models: ModelsConfig) -> str | None:
    """What a client of an architecture starts from by the run's settings; None where they do not tell."""
    alike = [spec for spec in models.clients.values() if describe(spec) == architecture]
    starts = {start_of_client(spec, models.student) for spec in alike}
    return starts.pop() if len(starts) == 1 else None


def draw(output: Path, last: RoundRecord, finished: dict[str, Any], class_names: Sequence[str]) -> None:
    """curves.png and synthetic.png."""
    accuracy_of_ensemble = finished["ensemble"]["test_accuracy"]
    report.plot_curves(
        output / "curves.png", last.distillation.losses, finished["rounds"], finished["clients"], accuracy_of_ensemble
    )
    if not last.stored:  # nothing was inverted
        return
    shown = list(zip(last.stored, last.teachers, strict=True))[:PICTURED]
    names = [verdict.called for verdict in last.admitted[:PICTURED]]
    images = Lazily(shown, lambda pair: align_targets(pair[0].load(), pair[1].classes))
    report.plot_images(output / "synthetic.png", images, names, class_names)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("flwr", "torch", "timm", "numpy")
    return {"smi-fed": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
