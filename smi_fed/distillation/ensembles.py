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
from smi_fed.distillation.robust import Joining, Mean
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
        factors: per teacher, of its weights, >= 0 and one of them above 0; None is 1 for each.

    Returns:
        (teachers, classes) or (teachers, 1) float32; every column sums to 1. A class that
        nobody has seen is weighted evenly, but for `factors`.

    Raises:
        ValueError: an unknown kind, negative counts or factors, factors of 0 alone, or classes weighted without
            every teacher's counts.
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
    evenly = torch.full((len(weights), 1), 1 / len(weights))
    if factors is not None:
        own = torch.tensor([float(factor) for factor in factors])[:, None]
        if bool((own < 0).any()) or not bool((own > 0).any()):
            raise ValueError(f"factors: got {list(factors)}, allowed: numbers >= 0, one of them above 0")
        weights, evenly = weights * own, own / own.sum()
    total = weights.sum(0)
    return torch.where(total > 0, weights / total.clamp(min=1e-12), evenly)


def certainty(logits: Tensor) -> Tensor:
    """How sure a teacher is of each image, (b, 1) in [1/classes, 1]: exp(-entropy) of its probabilities.

    One over the number of classes between which it hesitates. A teacher that has not seen the
    like of an image is often unsure of it, and is heard less there; no client has to tell anything.
    """
    return (-torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)).exp()


def ensemble_probabilities(
    logits: Iterable[Tensor],
    weights: Tensor,
    temperature: float = 1.0,
    *,
    by_certainty: bool = False,
    robust: Joining | None = None,
) -> Tensor:
    """Weighted mean (b, classes) of the teachers' softened probabilities, normalised again.

    With weights per class this is FedDF's average logits' cousin for skewed clients: a
    teacher is heard on a class as far as it has seen it.

    Args:
        by_certainty: each teacher's weights are multiplied by its `certainty` of the image.
        robust: what stands for the mean, see `smi_fed.distillation.robust`; None is the mean.
    """
    if robust is not None and not robust.in_turn:
        return _joined(list(logits), weights, temperature, by_certainty, robust)
    shares = (heard(each, weight, temperature, by_certainty) for each, weight in zip(logits, weights, strict=True))
    return functools.reduce(torch.logaddexp, shares).softmax(-1)


def heard(logits: Tensor, weight: Tensor, temperature: float, by_certainty: bool) -> Tensor:
    """Logarithm of one teacher's share (b, classes) in the ensemble."""
    share = (logits / temperature).log_softmax(-1) + weight.to(logits).log()
    return share + certainty(logits).log() if by_certainty else share


def _joined(
    logits: Sequence[Tensor], weights: Tensor, temperature: float, by_certainty: bool, robust: Joining
) -> Tensor:
    """What `robust` makes of all teachers' probabilities; their mean where it leaves no class anything."""
    probabilities = torch.stack([(each / temperature).softmax(-1) for each in logits])
    weights = weights.to(probabilities)[:, None]
    if by_certainty:
        weights = weights * torch.stack([certainty(each) for each in logits])
    found = robust.join(probabilities, weights)
    total = found.sum(-1, keepdim=True)
    found = torch.where(total > 1e-6, found, Mean().join(probabilities, weights))
    return found / found.sum(-1, keepdim=True)


@torch.no_grad()
def ensemble_answers(
    teachers: Iterable[nn.Module],
    views: Sequence[Tensor],
    weights: Tensor,
    temperature: float,
    *,
    by_certainty: bool = False,
    robust: Joining | None = None,
) -> list[Tensor]:
    """`ensemble_probabilities` (b, classes) of each view (b, c, h, w).

    The teachers answer in turn: one of them is needed at a time. For a mean nothing grows with their number; what
    else is `robust` needs the logits of all of them, (teachers, b, classes) of each view.

    Raises:
        ValueError: teachers of different numbers of classes, or weights for another number.
    """
    apart = robust is not None and not robust.in_turn
    total, every = list[Tensor](), list[list[Tensor]]()
    numbers = itertools.count()
    for teacher in teachers:
        number = next(numbers)  # `enumerate` would hold the teacher
        with evaluating(teacher):
            logits = [answer(teacher, view) for view in views]
        del teacher  # before the next one is loaded
        _check_classes(number, logits[0].shape[1], every[0] if every else total, weights)
        if apart:
            every.append(logits)
            continue
        own = [heard(each, weights[number], temperature, by_certainty) for each in logits]
        total = [torch.logaddexp(a, b) for a, b in zip(total, own, strict=True)] if total else own
    if robust is not None and apart:
        return [_joined(each, weights, temperature, by_certainty, robust) for each in zip(*every, strict=True)]
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
