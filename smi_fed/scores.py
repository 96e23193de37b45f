"""How often teachers are right, alone and together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fed.data import ImageSet
from smi_fed.distillation import Joining
from smi_fed.pipeline import joint_probabilities
from smi_fed.teachers import AnyTeacher
from smi_fed.training import predict


@dataclass(frozen=True)
class Score:
    """How often a teacher is right, each in [0, 1].

    Attributes:
        accuracy: on the whole test split.
        own: on the test images of the classes that its client has seen, `seen` of them.
    """

    accuracy: float
    own: float
    seen: int

    def doubt(self, train_loss: float) -> str:
        """Why the teacher is to be doubted, empty where it is not: it guesses, but its own training loss is low."""
        guesses = self.own < NEAR_CHANCE / max(1, self.seen) and train_loss < SURE * math.log(max(1, self.seen))
        return (
            f"{100 * self.own:.1f} % of the test images of its classes is near chance, although its training loss is "
            f"{train_loss:.2f}: has its spec the mean, std, channels and classes that it was trained with?"
            if guesses
            else ""
        )


NEAR_CHANCE, SURE = 1.5, 0.5
"""What is near chance, as a multiple of it, and what is a low loss, as a share of that of guessing."""


def scores_of(
    teachers: Sequence[AnyTeacher],
    kind: str,
    test: ImageSet,
    factors: Sequence[float] | None = None,
    robust: Joining | None = None,
) -> tuple[list[Score], float]:
    """Each teacher's score, and the accuracy of the ensemble as used in distilling at temperature 1, in [0, 1].

    One teacher is in memory at a time.
    """
    alone: list[Score] = []

    def heard() -> Iterator[Tensor]:
        for teacher in teachers:
            logits = predict(teacher.aligned, test.images)
            right = logits.argmax(1) == test.labels
            seen = torch.tensor(teacher.aligned_counts) > 0
            own = right[seen[test.labels]]
            alone.append(Score(_mean(right), _mean(own), int(seen.sum())))
            yield logits

    together = joint_probabilities(heard(), teachers, kind, factors, robust)
    return alone, _mean(together.argmax(1) == test.labels)


def _mean(right: Tensor) -> float:
    return float(right.float().mean()) if len(right) else 0.0


def ensemble_accuracy(teachers: Sequence[AnyTeacher], kind: str, test: ImageSet) -> float:
    """Accuracy of the ensemble alone, see `scores_of`."""
    return scores_of(teachers, kind, test)[1]


def ensemble_classes(teachers: Sequence[AnyTeacher], kind: str, images: Tensor) -> Tensor:
    """The student's class (n,) that the ensemble names for each image; one teacher is in memory at a time."""
    logits = (predict(teacher.aligned, images) for teacher in teachers)
    return joint_probabilities(logits, teachers, kind).argmax(1)
