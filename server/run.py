"""One federated run from settings to artefacts."""

from __future__ import annotations

import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from smi_fed import __version__, report
from smi_fed.checks import SettingError, require
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory, write_json
from smi_fed.models import build_model, count_parameters
from smi_fed.pipeline import PipelineConfig, ensemble_accuracy
from smi_fed.strategies import AdmissionPolicy, DataFreeDistillation, RoundRecord
from smi_fed.strategies.admission import DEFAULT_ARCHITECTURES
from smi_fed.strategies.core import describe
from smi_fed.strategies.watching_grid import WatchingGrid
from smi_fed.training import accuracy

log = logging.getLogger("smi_fed")


class FederatedRun:
    """Builds everything that can fail before a client is asked, then runs.

    Args:
        settings: checked settings.
        output: artefact directory; it is created.

    Raises:
        SettingError: models and data that do not fit each other, or a device that is not there.
        OSError: the artefact directory cannot be written.
    """

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings = settings
        self.output = writable_directory(output.expanduser().absolute())
        self.image_directory = writable_directory(self.output / "synthetic")
        self.device, reason = choose_device(settings.server.device)
        log.info("device: %s (%s)", self.device, reason)
        check_models(settings)
        _, self.test = load_images(settings.data)
        classes, wanted = len(self.test.class_names), settings.model.student.num_classes
        require(classes == wanted, "model.student.num_classes", wanted, f"{classes}, the data's classes")
        self.strategy = self._build_strategy()
        self.scores: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def _build_strategy(self) -> DataFreeDistillation:
        settings, admission = self.settings, self.settings.admission
        nodes = settings.strategy.min_nodes
        inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        policy = AdmissionPolicy(
            admission.architectures or DEFAULT_ARCHITECTURES, admission.max_parameters, admission.max_examples,
            admission.max_claim_ratio,
        )  # fmt: skip
        return DataFreeDistillation(
            inner,
            student=settings.model.student,
            pipeline=PipelineConfig(settings.server.images_per_teacher, settings.inversion, settings.distillation),
            policy=policy,
            min_teachers=settings.server.min_teachers,
            seed=settings.seed,
            device=self.device,
            image_directory=self.image_directory,
        )

    def execute(self, grid: Grid) -> dict[str, Any]:
        """Run all rounds and write the artefacts; returns the report.

        A run that fails leaves a report.json with status 'failed' and no student.
        """
        for name in ("report.json", "student.safetensors"):
            (self.output / name).unlink(missing_ok=True)
        try:
            self.strategy.start(
                grid=WatchingGrid(grid),
                initial_arrays=self.strategy.initial_arrays,
                num_rounds=self.settings.strategy.rounds,
                timeout=self.settings.strategy.timeout,
                evaluate_fn=self._evaluate,
            )
            finished = self._report()
            self._write(finished)
        except BaseException as error:
            (self.output / "student.safetensors").unlink(missing_ok=True)
            failure = {
                "schema": report.SCHEMA_VERSION,
                "status": "failed",
                "reason": f"{type(error).__name__}: {error}",
            }
            write_json(self.output / "report.json", failure)
            raise
        log.info("artefacts: %s", self.output)
        return finished

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        student = build_model(self.settings.model.student).to(self.device)
        student.load_state_dict(arrays.to_torch_state_dict())
        score = accuracy(student, self.test)
        self.student = student.eval()
        self.scores.append({
            "round": server_round,
            "student_test_accuracy": score,
            "seconds": time.perf_counter() - self.started,
        })  # fmt: skip
        return MetricRecord({"test_accuracy": score})

    def _report(self) -> dict[str, Any]:
        settings, last = self.settings, self.strategy.rounds[-1]
        seconds = self._seconds()
        kind = settings.distillation.ensemble
        return {
            "schema": report.SCHEMA_VERSION,
            "status": "completed",
            "seed": settings.seed,
            "device": str(self.device),
            "versions": versions(),
            "seconds": seconds,
            "clients": [self._client(verdict) for verdict in last.verdicts],
            "ensemble": {"weights": kind, "test_accuracy": ensemble_accuracy(last.teachers, kind, self.test)},
            "student": {
                "architecture": describe(settings.model.student),
                "parameters": count_parameters(self.student),
                "test_accuracy": self.scores[-1]["student_test_accuracy"],
            },
            "inversion": self._inversion(last, seconds["inversion"]),
            "distillation": {"steps": last.distillation.steps, "seconds": seconds["distillation"]},
            "rounds": self.scores,
        }

    def _seconds(self) -> dict[str, float]:
        rounds = self.strategy.rounds
        total = time.perf_counter() - self.started
        return {
            "train": max(0.0, self.scores[-1]["seconds"] - sum(each.seconds for each in rounds)),
            "inversion": sum(record.seconds for each in rounds for record in each.inversions),
            "distillation": sum(each.distillation.seconds for each in rounds),
            "total": total,
        }

    def _client(self, verdict: Any) -> dict[str, Any]:
        teacher = verdict.teacher
        return {
            "node": str(verdict.node),  # 64-bit ids do not survive JSON numbers
            "name": teacher.name if teacher else f"node {verdict.node}",
            "architecture": verdict.architecture,
            "num_examples": verdict.num_examples,
            "test_accuracy": accuracy(teacher.model, self.test) if teacher else None,
            "admitted": verdict.admitted,
            "reason": verdict.reason,
        }

    def _inversion(self, last: RoundRecord, seconds: float) -> dict[str, Any]:
        config = self.settings.inversion
        kept = sum(float(each.mask.float().mean()) * len(each) for each in last.images)
        return {
            "method": f"{config.selection} selection, {config.parametrisation}, stops '{config.schedule}'",
            "images": sum(map(len, last.images)),
            "iterations": config.iterations,
            "seconds": seconds,
            "kept_fraction": kept / sum(map(len, last.images)),
            "flops": sum(each.flops for each in last.inversions),
            "dense_flops": sum(each.dense_flops for each in last.inversions),
        }

    def _write(self, finished: dict[str, Any]) -> None:
        last = self.strategy.rounds[-1]
        ensemble = finished["ensemble"]["test_accuracy"]
        report.plot_curves(
            self.output / "curves.png", last.distillation.losses, finished["rounds"], finished["clients"], ensemble
        )
        names = [teacher.name for teacher in last.teachers]
        report.plot_images(self.output / "synthetic.png", last.images, names, self.test.class_names)
        report.save_student(self.output / "student.safetensors", self.student)
        write_json(self.output / "report.json", finished)


def check_models(settings: Settings) -> None:
    """Build every architecture on the meta device, so that none fails after training.

    Raises:
        SettingError: naming the model's key.
    """
    specs = {f"clients.{name}": spec for name, spec in settings.model.clients.items()}
    for key, spec in {**specs, "student": settings.model.student}.items():
        with torch.device("meta"):
            try:
                model = build_model(spec)
            except SettingError as error:
                raise error.under(f"model.{key}") from error
        data = settings.data
        size, channels = model.image_size, len(model.mean)
        wanted = (data.image_size, data.image_size)
        require(size == wanted, f"model.{key}.image_size", size, f"data.image_size, {wanted}")
        require(channels == data.channels, f"model.{key}.kwargs.in_chans", channels, f"data.channels, {data.channels}")
        classes = settings.model.student.num_classes
        require(spec.num_classes == classes, f"model.{key}.num_classes", spec.num_classes, f"the student's, {classes}")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("flwr", "torch", "timm", "numpy")
    return {"smi-fed": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
