"""Whom the others' synthetic images speak against: each teacher names the classes of images that others gave.

Whoever trained on the same classes names most of such images as what they were made for. Who trained on false labels,
or on nothing, does not. A backdoor is silent on such images: `triggers` looks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smi_fed.distillation.ensembles import answer
from smi_fed.distillation.robust import Agreement
from smi_fed.distillation.triggers import find_triggers
from smi_fed.lazy import one_by_one
from smi_fed.sparse_images import SparseImages, classes_of
from smi_fed.training import evaluating

LEAST_IMAGES = 5
"""Fewer images of classes that both have seen say nothing of a pair of teachers."""
LEAST_PAIRS = 2
"""Of a teacher that can be compared with fewer others nobody can tell which of them is wrong."""
NEAR_CHANCE = 0.05
"""Where the teachers' median agreement is no better, their images say nothing of anybody."""


@dataclass(frozen=True)
class Opinion:
    """What the other teachers' images say of one.

    Attributes:
        factor: of its weight in the ensemble and of how often its own images are drawn, in [0, 1].
        agreement: with the others, 1 is full and 0 chance; None where there was too little to compare.
        reason: why the factor is below 1.
    """

    factor: float = 1.0
    agreement: float | None = None
    reason: str = ""


@torch.no_grad()
def opinions(
    teachers: Sequence[nn.Module], images: Sequence[SparseImages], counts: Tensor, config: Agreement
) -> list[Opinion]:
    """An opinion of each teacher.

    One teacher is in memory at a time, and `config.images` images of each.

    Args:
        teachers: with the student's classes.
        images: of each teacher, in the same order; targets are the student's classes.
        counts: (teachers, classes) examples that each has seen.
    """
    if len(teachers) <= LEAST_PAIRS:
        return [Opinion()] * len(teachers)
    chosen = one_by_one(images, lambda each: evenly(each, config.images))
    counts = counts.to(torch.float32)
    said = one_by_one(range(len(teachers)), lambda i: said_by(teachers[i], chosen, counts[i] > 0))
    scores = pair_scores(said, [classes_of(each) for each in chosen], counts)
    found = [judged(each, scores, config.least) for each in standings(scores)]
    if config.trigger is not None:
        reasons = find_triggers(teachers, chosen, config.trigger)
        found = [
            Opinion(0.0, each.agreement, "; ".join(filter(None, [each.reason, reason]))) if reason else each
            for each, reason in zip(found, reasons, strict=True)
        ]
    if any(each.factor for each in found):
        return found
    return [replace(each, factor=1.0, reason=f"{each.reason}; heard, since nobody would be left") for each in found]


def evenly(images: SparseImages, count: int) -> SparseImages:
    """At most `count` of the images, as evenly over their classes as there are any."""
    turns, order = dict[int, int](), []
    for place, target in enumerate(classes_of(images).tolist()):
        turns[target] = turns.get(target, 0) + 1
        order.append((turns[target], place))
    return images.select(torch.tensor(sorted(place for _, place in sorted(order)[:count]), dtype=torch.long))


def said_by(teacher: nn.Module, sets: Iterable[SparseImages], seen: Tensor) -> list[Tensor]:
    """Of each set the classes (n,) that the teacher names, among those that it has seen (classes,)."""
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    with evaluating(teacher):
        logits = [answer(teacher, each.images.to(device)).cpu() for each in sets]
    return [each.masked_fill(~seen, -torch.inf).argmax(1) for each in logits]


def pair_scores(said: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], counts: Tensor) -> Tensor:
    """How well teacher a names what the images of teacher b were made for, (teachers, teachers); NaN where unknown.

    Cohen's kappa: 1 where all are named, 0 at chance. Only images of classes that both have seen count, and
    each class as much as the one of both has seen of it that has seen less.

    Args:
        said: [a][b] (n,) the classes that a names for b's images.
        targets: [b] (n,).
        counts: (teachers, classes).
    """
    found = torch.full((len(said), len(said)), torch.nan)
    for a, own in enumerate(said):
        for b, target in enumerate(targets):
            common = torch.minimum(counts[a], counts[b])
            if a != b and int((common[target] > 0).sum()) >= LEAST_IMAGES:
                there = torch.bincount(target, minlength=len(common)).clamp(min=1)
                found[a, b] = kappa(own[b], target, (common / there)[target])
    return found


def kappa(said: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Agreement of two namings (n,) beyond chance, images weighted by (n,); NaN where one class is all there is."""
    weights = weights / weights.sum()
    classes = int(torch.cat([said, targets]).max()) + 1
    shares = [torch.zeros(classes).index_add_(0, each, weights) for each in (said, targets)]
    chance = float((shares[0] * shares[1]).sum())
    if float(shares[1].max()) > 1 - 1e-6:
        return torch.nan
    return (float(weights[said == targets].sum()) - chance) / (1 - chance)


def standings(scores: Tensor) -> list[float | None]:
    """Each teacher's median agreement with the others' images, the upper one of two; None with fewer than two.

    As long as fewer than half of the others are false, neither can they lift each other nor lower an honest teacher.
    """
    known = [sorted(row[~row.isnan()].tolist()) for row in scores]
    return [row[len(row) // 2] if len(row) >= LEAST_PAIRS else None for row in known]


def judged(standing: float | None, scores: Tensor, least: float) -> Opinion:
    """The opinion of a teacher with this standing among all of `scores`.

    It keeps its weight from `least` of the median standing on, has none at half of that, and in between a part.
    """
    others = sorted(each for each in standings(scores) if each is not None)
    typical = others[len(others) // 2] if others else 0.0
    if standing is None or typical < NEAR_CHANCE:
        return Opinion(agreement=standing)
    factor = min(1.0, max(0.0, 2 * standing / (typical * least) - 1))
    if factor == 1:
        return Opinion(agreement=standing)
    what = "left out of the ensemble" if factor == 0 else f"heard at {factor:.0%} of its weight"
    reason = f"its agreement on the others' images is {standing:.2f}, the teachers' median {typical:.2f}: {what}"
    return Opinion(factor, standing, reason)
