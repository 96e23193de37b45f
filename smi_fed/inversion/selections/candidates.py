"""What a selection chooses from, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from smi_fed.inversion import randomness
from smi_fed.inversion.teacher import Teacher, View


@dataclass(frozen=True)
class Candidates:
    """The patches of a batch among which a stop chooses.

    Attributes:
        teacher: the model that is inverted.
        view: the patches in work, not augmented.
        targets: (b,) or (b, classes).
        key, ids, age: what random choices are a function of, see `randomness`.
        pull: computes the size of the whole objective's gradient in each patch (b, k), for one
            forward and backward pass.
    """

    teacher: Teacher
    view: View
    targets: Tensor
    key: int
    ids: Tensor
    age: Tensor
    pull: Callable[[], Tensor]

    def uniform(self) -> Tensor:
        """One draw (b, k) float64 in [0, 1) for each patch in work."""
        return randomness.uniform(self.key, self.ids, self.age, randomness.SELECT, self.view.positions.shape[1])


Selection = Callable[[Candidates], Tensor]
"""A batch at a stop -> score (b, k); the patches with the highest go on."""


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (b, count) of the highest scores (b, k), ascending."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values
