"""Which patches go on when others stop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from smi_fed.inversion import randomness
from smi_fed.inversion.teacher import Teacher, View

Selection = Callable[[Teacher, View, Tensor, int, Tensor, Tensor], Tensor]
"""(teacher, clean view, targets (b,), key, ids (b,), age (b,)) -> score (b, k); the highest go on."""


def attention(teacher: Teacher, view: View, targets: Tensor, key: int, ids: Tensor, age: Tensor) -> Tensor:
    """The teacher's own importance; for [CLS] pooling the paper's criterion (section 3.2)."""
    return teacher.importance(view, targets)


def random(teacher: Teacher, view: View, targets: Tensor, key: int, ids: Tensor, age: Tensor) -> Tensor:
    """Uniformly at random: the control for every other selection. Costs no teacher pass."""
    return randomness.uniform(key, ids, age, randomness.SELECT, view.positions.shape[1])


SELECTIONS: dict[str, Selection] = {"attention": attention, "random": random}


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (b, count) of the highest scores (b, k), ascending."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values
