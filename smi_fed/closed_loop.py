"""Where the server's next second goes: to the teachers and classes about which the student still disagrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smi_fed.pipeline import TrainedTeacher, joint_probabilities
from smi_fed.sparse_images import SparseImages
from smi_fed.training import predict


@torch.no_grad()
def disagreement(
    student: nn.Module, teachers: Sequence[TrainedTeacher], images: Sequence[SparseImages], kind: str
) -> Tensor:
    """Mean KL divergence (teachers, classes) from the ensemble to the student, over the images of each.

    Args:
        images: of each teacher, in the same classes for all.
        kind: of the ensemble, see `DistillationConfig`.

    Returns:
        In nats, on the CPU; 0 where a teacher has no image of a class.
    """
    found = torch.zeros(len(teachers), teachers[0].model.spec.num_classes)
    for number, each in enumerate(images):
        logits = [predict(teacher.model, each.images) for teacher in teachers]
        told = joint_probabilities(logits, teachers, kind).cpu()
        said = predict(student, each.images).log_softmax(1).cpu()
        apart = (told * (told.clamp(min=1e-12).log() - said)).sum(1)
        counts = torch.bincount(each.targets, minlength=found.shape[1])
        sums = torch.zeros(found.shape[1]).index_add(0, each.targets, apart.float())
        found[number] = sums / counts.clamp(min=1)
    return found


def allotted(weights: Tensor, total: int) -> Tensor:
    """How many of `total` each gets (int64, of the shape of `weights`), in proportion, by largest remainders.

    Raises:
        ValueError: weights below 0, or none above it.
    """
    if bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ValueError(f"weights: got {weights.tolist()}, allowed: numbers >= 0, one above 0 at least")
    exact = weights.double().flatten() * (total / float(weights.double().sum()))
    counts = exact.floor().long()
    most = (exact - counts).argsort(descending=True, stable=True)[: total - int(counts.sum())]
    counts[most] += 1
    return counts.view(weights.shape)
