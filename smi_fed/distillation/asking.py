"""Which teachers are asked of an image: those that it was made from, and a few of the others.

To ask each of N teachers of the images of all N costs N^2. What the ensemble says is a sum over
teachers, and a sum can be estimated: the teachers of an image's own are heard as they are, and k
others, drawn by how much they are heard on the image's classes, stand for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi_fed.distillation.ensembles import answer, heard
from smi_fed.training import evaluating

EVENLY = 0.5
"""Share of the draw that is even: whom the classes do not suggest may still have much to say, and then counts much."""

BATCH = 256
"""Images that a teacher is shown at a time."""


@dataclass(frozen=True)
class Asking:
    """What the draw of teachers goes by.

    Attributes:
        owners: (images,) the teacher that each image was made from; -1 where it is none of these.
        classes: (images,) what each image was made for.
        weights: (teachers, classes) or (teachers, 1), see `ensemble_weights`.
        others: teachers that are drawn for each image.
    """

    owners: Tensor
    classes: Tensor
    weights: Tensor
    others: int

    def draw(self, rows: Tensor, partners: Tensor | None, generator: torch.Generator) -> Tensor:
        """How much each teacher stands for in a batch, (teachers, b); 0 where it is not asked.

        A teacher's weight times this is, in the mean over draws, its weight: the estimate of the
        sum over teachers is unbiased. (It is normalised afterwards, which is not: by O(1/others).)

        Args:
            rows: (b,) of the images.
            partners: (b,) places in `rows` of the images that they are mixed with.
        """
        mixed = [rows] if partners is None else [rows, rows[partners]]
        weights = self.weights.double()
        wide = weights.expand(-1, max(int(self.classes.max()) + 1, weights.shape[1]))
        own = torch.zeros(len(weights), len(rows), dtype=torch.bool)
        likely = torch.zeros(len(weights), len(rows), dtype=torch.float64)
        for places in mixed:
            known, columns = self.owners[places], torch.arange(len(rows))
            own[known[known >= 0], columns[known >= 0]] = True
            likely += wide[:, self.classes[places]] / len(mixed)
        likely = likely.masked_fill(own, 0)
        rest = (~own).double()
        chance = EVENLY * rest / rest.sum(0).clamp(min=1) + (1 - EVENLY) * likely / likely.sum(0).clamp(min=1e-12)
        chance = chance / chance.sum(0).clamp(min=1e-12)
        drawn = torch.multinomial(chance.T, self.others, replacement=True, generator=generator)
        times = torch.zeros_like(chance).T.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)).T
        stands = torch.where(times > 0, times / (self.others * chance).clamp(min=1e-300), torch.zeros_like(times))
        return torch.where(own, 1.0, stands).float()


@torch.no_grad()
def sampled_answers(
    teachers: Iterable[nn.Module],
    views: Sequence[Tensor],
    weights: Tensor,
    temperature: float,
    asked: Sequence[Tensor],
    *,
    by_certainty: bool = False,
) -> list[Tensor]:
    """`ensemble_answers` where each image is asked of some teachers alone.

    Args:
        asked: of each view what `Asking.draw` gave; some teacher is asked of each image.
    """
    stands = torch.cat(list(asked), dim=1).to(views[0])
    images, total = torch.cat(list(views)), torch.empty(0)
    number = -1
    for teacher in teachers:
        number += 1
        rows = stands[number].nonzero()[:, 0]
        if not len(rows):
            continue
        with evaluating(teacher):
            logits = torch.cat([answer(teacher, images[part]) for part in rows.split(BATCH)])
        del teacher  # before the next one is loaded
        own = heard(logits, weights[number], temperature, by_certainty) + stands[number, rows, None].log()
        if not len(total):
            total = own.new_full((len(images), own.shape[1]), -torch.inf)
        total[rows] = torch.logaddexp(total[rows], own)
    return list(total.softmax(-1).split([len(view) for view in views]))
