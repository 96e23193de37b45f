"""What a client measures on the images that it holds out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from clients.node import Node, node_split
from clients.rounds import OwnModels, TrainRequest
from smi_fed.alignment import class_positions
from smi_fed.config import Settings
from smi_fed.data import ImageSet
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model
from smi_fed.strategies.evaluation import Counts, Measured
from smi_fed.training import predict

log = logging.getLogger("smi_fed")


def measure(settings: Settings, node: Node, request: TrainRequest, own: OwnModels, device: torch.device) -> Measured:
    """The student's right answers and those of the client's newest model, without training.

    Each is shown the images at its own size and answers among all the classes that it knows.

    Raises:
        EmptyPartitionError, SettingError, FileNotFoundError, FileFormatError: as in training.
    """
    spec = settings.model.of_client(node.number, node.arch)
    _, held_out, spec = node_split(settings, node, spec)
    if not len(held_out):
        log.warning("%s: nothing is held out, with test_fraction %s there is nothing to evaluate",
                    node.called, node.data.test_fraction)  # fmt: skip
        return Measured(node.name, Counts(0, 0))
    places = torch.tensor(class_positions(spec, settings.model.student))
    labels = places[held_out.labels]
    models = [model.to(device) for model in (request.student(), newest(spec, own, request.round)) if model is not None]
    named = answers(models, held_out)
    student, theirs = named[0] == labels, places[named[1]] == labels if named[1:] else None
    tells = settings.client.send_label_counts
    total = counted(torch.zeros_like(labels), student, theirs, 1)[0]
    log.info("%s, round %d: right on %d held-out images: the student %d, its own model %s",
             node.called, request.round, total.images, total.student,
             "-" if total.own is None else total.own)  # fmt: skip
    classes = counted(labels, student, theirs, settings.model.student.num_classes) if tells else None
    return Measured(node.name, total, classes)


def newest(spec: ModelSpec, own: OwnModels, server_round: int) -> Classifier | None:
    """The client's model as it stands after this round; None if it was never asked to train."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(architecture_of(spec))
    weights = own.newest_before(server_round + 1, model)
    if weights is None:
        return None
    model.load_state_dict(weights)
    return model.eval()


def answers(models: Sequence[Classifier], data: ImageSet, batch_size: int = 256) -> list[Tensor]:
    """For each model (n,) int64, the class that it names for each image at its own size; a size is decoded once."""
    found: list[list[Tensor]] = [[] for _ in models]
    for size in {model.image_size for model in models}:
        for batch in data.resized(size).loaded().images.split(batch_size):
            for named, model in zip(found, models, strict=True):
                if model.image_size == size:
                    named.append(predict(model, batch).argmax(1))
    return [torch.cat(named) for named in found]


def counted(labels: Tensor, student: Tensor, own: Tensor | None, classes: int) -> tuple[Counts, ...]:
    """For each class how many images there are and how many are right.

    Args:
        labels: (n,) int64, from 0 to `classes` - 1.
        student, own: (n,) bool, whether each is right.
    """
    images, theirs = torch.bincount(labels, minlength=classes), torch.bincount(labels[student], minlength=classes)
    mine = [None] * classes if own is None else torch.bincount(labels[own], minlength=classes).tolist()
    return tuple(Counts(*row) for row in zip(images.tolist(), theirs.tolist(), mine, strict=True))
