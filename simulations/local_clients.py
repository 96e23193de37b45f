"""The clients of a run, trained in this process and kept on disk, for studies that start after training."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from clients.app import own_images, own_statistics
from server.run import FederatedRun
from simulations.runner.ledger import digest, sources_digest
from smi_fed.config import Settings
from smi_fed.files import load_tensors, save_tensors
from smi_fed.inversion import SparseImages
from smi_fed.models import build_model
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, invert_teacher, seeded
from smi_fed.training import train

log = logging.getLogger("smi_fed")

FORMAT, VERSION = "smi-fed.local-client", 1


def check_clients(settings: Settings, _cell: object = None) -> None:
    """Raise SettingError where models, data or strategy cannot be; what was found sound before is not built again."""
    name = digest(settings.model, settings.data, settings.strategy, settings.admission, settings.pool)
    if name not in _SOUND:
        with tempfile.TemporaryDirectory(prefix="smi-fed-") as scratch:
            FederatedRun(settings, Path(scratch)).executor.close()
        _SOUND.add(name)


_SOUND: set[str] = set()


def trained_clients(settings: Settings, number: int, cache: Path) -> list[TrainedTeacher]:
    """`number` clients as the federation trains them, from `cache` where the same code trained them before."""
    return [trained_client(settings, i, number, cache) for i in range(number)]


def trained_client(
    settings: Settings, number: int, total: int, cache: Path, device: torch.device | str = "cpu"
) -> TrainedTeacher:
    """Client `number` of `total`, trained on `device`."""
    cache.mkdir(parents=True, exist_ok=True)
    spec = settings.model.of_client(number)
    data = own_images(settings, number, total, spec)
    torch.manual_seed(settings.seed * 1000 + number)
    model = build_model(spec).to(device)
    name = digest(settings.seed, spec, asdict(settings.data), asdict(settings.client), number, total, sources_digest())
    path = cache / f"client-{name}.safetensors"
    if path.exists():
        weights, _ = load_tensors(path, FORMAT, VERSION)
        model.load_state_dict(weights)
    else:
        log.info("training client %d of %d (%s)", number, total, spec.name)
        train(model, data, settings.client.training, generator=seeded(settings.seed, number))
        save_tensors(path, model.state_dict(), FORMAT, VERSION)
    counts = tuple(data.label_counts().tolist()) if settings.client.send_label_counts else None
    return TrainedTeacher(f"client {number}", model.eval(), len(data), counts, own_statistics(settings, model, data))


def kept_images(settings: Settings, number: int, teacher: TrainedTeacher, cache: Path) -> SparseImages:
    """Images of a client, drawn as client `number` of round 1; from `cache` where they were made before."""
    pipeline = PipelineConfig(settings.server.images_per_teacher, settings.inversion, settings.distillation)
    name = digest(settings.seed, number, teacher.digest, asdict(settings.inversion), pipeline.images_per_teacher)
    path = cache / f"{name}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        invert_teacher(teacher, number, pipeline, seeded(settings.seed, 1, number))[0].save(path)
    return SparseImages.load(path)
