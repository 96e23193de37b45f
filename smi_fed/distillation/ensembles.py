"""What several teachers say together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from smi_fed.alignment import resize
from smi_fed.checks import require_choice
from smi_fed.distillation.config import BY_CLASS, ENSEMBLES
from smi_fed.models import Classifier, logits_of, unwrapped
from smi_fed.training import evaluating


def ensemble_weights(
    kind: str,
    num_examples: Sequence[int],
    label_counts: Sequence[Sequence[float] | None],
    factors: Sequence[float] | None = None,
) -> Tensor:
    """Weight of each teacher for each class.

    Args:
        kind: uniform | examples (by the client's examples) | class (by its examples of that class).
            `certainty` is as uniform, and `class_certainty` as class: their other factor depends on
            the image, see `certainty`.
        num_examples: per teacher.
        label_counts: per teacher, examples of each class; needed where classes are weighted.
        factors: per teacher, by which its weights are multiplied; None is 1.

    Returns:
        (teachers, classes) or (teachers, 1) float32; every column sums to 1. A class that
        nobody has seen is weighted evenly.

    Raises:
        ValueError: an unknown kind, negative counts, or classes weighted without every teacher's counts.
    """
    require_choice("ensemble", kind, ENSEMBLES)
    if kind in BY_CLASS:
        if any(counts is None for counts in label_counts):
            raise ValueError(
                f"ensemble: got {kind!r} but not every client sent label counts, "
                "allowed: certainty | examples | uniform"
            )
        weights = torch.tensor([list(counts or ()) for counts in label_counts], dtype=torch.float32)
    else:
        values = [float(n) for n in num_examples] if kind == "examples" else [1.0] * len(num_examples)
        weights = torch.tensor(values)[:, None]
    if bool((weights < 0).any()):
        raise ValueError("ensemble: got negative counts, allowed: counts >= 0")
    factor = torch.ones(len(weights), 1) if factors is None else torch.tensor(factors, dtype=torch.float32)[:, None]
    weights = weights * factor
    total = weights.sum(0)
    return torch.where(total > 0, weights / total.clamp(min=1e-12), factor / factor.sum())


def certainty(logits: Tensor) -> Tensor:
    """How sure a teacher is of each image, (b, 1) in [1/classes, 1]: exp(-entropy) of its probabilities.

    One over the number of classes between which it hesitates. A teacher that has not seen the
    like of an image is often unsure of it, and is heard less there; no client has to tell anything.
    """
    return (-torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)).exp()


def ensemble_probabilities(
    logits: Iterable[Tensor], weights: Tensor, temperature: float = 1.0, *, by_certainty: bool = False
) -> Tensor:
    """Weighted mean (b, classes) of the teachers' softened probabilities, normalised again.

    With weights per class this is FedDF's average logits' cousin for skewed clients: a
    teacher is heard on a class as far as it has seen it.

    Args:
        by_certainty: each teacher's weights are multiplied by its `certainty` of the image.
    """
    heard = (_heard(each, weight, temperature, by_certainty) for each, weight in zip(logits, weights, strict=True))
    return functools.reduce(torch.logaddexp, heard).softmax(-1)


def _heard(logits: Tensor, weight: Tensor, temperature: float, by_certainty: bool) -> Tensor:
    """Logarithm of one teacher's share (b, classes) in the ensemble."""
    heard = (logits / temperature).log_softmax(-1) + weight.to(logits).log()
    return heard + certainty(logits).log() if by_certainty else heard


@torch.no_grad()
def ensemble_answers(
    teachers: Iterable[nn.Module],
    views: Sequence[Tensor],
    weights: Tensor,
    temperature: float,
    *,
    by_certainty: bool = False,
) -> list[Tensor]:
    """`ensemble_probabilities` (b, classes) of each view (b, c, h, w).

    The teachers answer in turn: one of them is needed at a time, and nothing grows with their number.

    Raises:
        ValueError: teachers of different numbers of classes, or weights for another number.
    """
    total: list[Tensor] = []
    numbers = itertools.count()
    for teacher in teachers:
        number = next(numbers)  # `enumerate` would hold the teacher
        with evaluating(teacher):
            logits = [answer(teacher, view) for view in views]
        del teacher  # before the next one is loaded
        _check_classes(number, logits[0].shape[1], total, weights)
        own = [_heard(each, weights[number], temperature, by_certainty) for each in logits]
        total = [torch.logaddexp(a, b) for a, b in zip(total, own, strict=True)] if total else own
    return [each.softmax(-1) for each in total]


def _check_classes(number: int, classes: int, before: Sequence[Tensor], weights: Tensor) -> None:
    if before and before[0].shape[1] != classes:
        raise ValueError(
            f"teachers: got {classes} classes in number {number} and {before[0].shape[1]} before it, allowed: the same "
            "classes; smi_fed.alignment.Aligned puts a teacher's into a student's"
        )
    if weights.shape[1] not in (1, classes):
        raise ValueError(f"weights: got {weights.shape[1]} columns, allowed: 1, or {classes}, one for each class")


def answer(teacher: nn.Module, images: Tensor) -> Tensor:
    """Logits (b, classes) in the images' dtype; the teacher is shown them in its own dtype and at its own size."""
    dtype = next((weight.dtype for weight in teacher.parameters() if weight.is_floating_point()), images.dtype)
    inner = unwrapped(teacher)
    shown = resize(images, inner.image_size) if isinstance(inner, Classifier) else images
    return logits_of(teacher(shown.to(dtype))).to(images.dtype)
