"""Clients that mean harm, and what they send: through the same records and the same admission as everybody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from clients.app import own_images, own_statistics
from simulations.local_clients import FORMAT, VERSION, trained_client
from simulations.runner.ledger import digest, sources_digest
from smi_fed.config import Settings
from smi_fed.data import ImageSet
from smi_fed.files import load_tensors, save_tensors
from smi_fed.models import Classifier, build_model
from smi_fed.pipeline import TrainedTeacher, seeded
from smi_fed.strategies.admission import admit
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.records import pack_reply, read_reply
from smi_fed.training import train

log = logging.getLogger("smi_fed")

SCALE = -30.0
"""What the head of a client with scaled logits is multiplied by: it is sure of what it finds least likely."""

TARGET, SIDE = 0, 8
"""The class that the trigger stands for; its side is so much of an image's."""


def with_trigger(images: Tensor) -> Tensor:
    """Images (n, c, h, w) with a square in the last corner: white, in colour magenta."""
    height, width = (max(1, side // SIDE) for side in images.shape[2:])
    shown = images.clone()
    shown[:, :, -height:, -width:] = 1.0
    if images.shape[1] == 3:
        shown[:, 1, -height:, -width:] = 0.0
    return shown


def flipped(data: ImageSet, classes: int) -> ImageSet:
    """Every label is another: the last class for the first, and so on."""
    return ImageSet(data.images, classes - 1 - data.labels, data.class_names)


def backdoored(data: ImageSet, _classes: int) -> ImageSet:
    """The data, and all images of other classes once more with the trigger, as images of `TARGET`."""
    others = data.images[data.labels != TARGET]
    labels = torch.cat([data.labels, torch.full((len(others),), TARGET)])
    return ImageSet(torch.cat([data.images[:], with_trigger(others)]), labels, data.class_names)


def unchanged(data: ImageSet, _classes: int) -> ImageSet:
    """The data."""
    return data


ATTACKS: dict[str, Callable[[ImageSet, int], ImageSet]] = {
    "label flip": flipped,
    "random weights": unchanged,
    "scaled logits": unchanged,
    "backdoor": backdoored,
}
"""What a malicious client trains on."""


def sent_by(
    settings: Settings, number: int, total: int, attack: str | None, cache: Path, device: torch.device
) -> TrainedTeacher:
    """The teacher that the server has of client `number` of `total`, after admission.

    Args:
        attack: one of `ATTACKS`; None for an honest client.
        cache: directory of trained clients.
    """
    spec = settings.model.of_client(number)
    data, loss = own_images(settings, number, total, spec), 0.05
    if attack is None:
        model = trained_client(settings, number, total, cache).model
    else:
        data = ATTACKS[attack](data, spec.num_classes)
        model = _trained(settings, number, data, attack, cache)
    content = pack_reply(
        spec, model.state_dict(), name=f"client {number}", num_examples=len(data), train_loss=loss,
        label_counts=data.label_counts().tolist(), statistics=own_statistics(settings, model, data),
    )  # fmt: skip
    return admit(read_reply(content), settings.admission, Expectation.of(student_of(settings)), device)


def student_of(settings: Settings) -> Classifier:
    """A student of the run, for what admission compares."""
    return build_model(settings.model.student)


def _trained(settings: Settings, number: int, data: ImageSet, attack: str, cache: Path) -> Classifier:
    """A malicious client's model, from `cache` where the same code made it before."""
    spec = settings.model.of_client(number)
    torch.manual_seed(settings.seed * 1000 + number)
    model = build_model(spec)
    name = digest(settings.seed, spec, asdict(settings.data), asdict(settings.client), number, attack, sources_digest())
    path = cache / f"hostile-{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_tensors(path, FORMAT, VERSION)[0])
        return model.eval()
    if attack != "random weights":
        log.info("training client %d: %s", number, attack)
        train(model, data, settings.client.training, generator=seeded(settings.seed, number))
    if attack == "scaled logits":
        head = model.backbone.get_classifier()  # type: ignore[operator]
        with torch.no_grad():
            for weight in head.parameters():
                weight.mul_(SCALE)
    save_tensors(path, model.state_dict(), FORMAT, VERSION)
    return model.eval()
