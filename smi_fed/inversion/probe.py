"""A few images, inverted densely to see what a teacher attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_fed.inversion.leaving import Last
from smi_fed.inversion.loop import scores_by, start, step
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.planning import PROBES
from smi_fed.inversion.problem import Problem
from smi_fed.inversion.schedule import StopSchedule


def probe(problem: Problem, ages: Sequence[int], *, multi_label: bool = False) -> list[Tensor]:
    """The teacher's importance (PROBES, n) of all patches at each of `ages`, rising, see `Probe`.

    The images' ids are negative, so that no image of the inversion shares their draws; one of
    each class in turn. They are halved as often as it takes to fit into memory.

    Args:
        multi_label: whether the teacher's targets are (b, classes).

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    config = replace(problem.config, schedule=StopSchedule(), leaving=Last())
    problem = replace(problem, config=config, warm=None)
    ids = -1 - torch.arange(PROBES, device=problem.teacher.mean.device)
    targets = (-1 - ids) % problem.teacher.classes
    if multi_label:
        targets = F.one_hot(targets, problem.teacher.classes).to(problem.teacher.mean)
    size = min(PROBES, config.batch_size) if isinstance(config.batch_size, int) else PROBES
    while True:
        try:
            parts = zip(ids.split(size), targets.split(size), strict=True)
            looks = [scores_along(problem, part, labels, ages, ("attention",))["attention"] for part, labels in parts]
            return [torch.cat(at_once) for at_once in zip(*looks, strict=True)]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)


def scores_along(
    problem: Problem, ids: Tensor, targets: Tensor, ages: Sequence[int], selections: Sequence[str]
) -> dict[str, list[Tensor]]:
    """What each of `selections` says of all patches (b, n) at each of `ages`, rising, of a dense inversion."""
    state = start(problem, ids, targets)
    touching = neighbours(state.kept, problem.teacher.grid)
    looks: dict[str, list[Tensor]] = {name: [] for name in selections}
    before = 0
    for age in ages:
        for _ in range(age - before):
            step(problem, state, touching)
        for name in selections:
            looks[name].append(scores_by(problem, state, name))
        before = age
    return looks
