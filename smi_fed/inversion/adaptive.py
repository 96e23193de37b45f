"""A stop schedule that trusts a teacher's attention as far as it says something.

Some pretrained ViTs attend to artefacts or to everything. A few images are inverted densely
as a probe; at each planned stop two numbers tell how far the plan is followed:

- how peaked attention is: exp(entropy) is the number of patches that it is spread over, and
  never fewer go on;
- how stable it is: the overlap of the patches that would go on with those half-way since the
  stop before, less what chance gives (0 chance, 1 the same).

Attention that is flat, or that jumps, gives dense inversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_fed.inversion.choices import Last
from smi_fed.inversion.loop import scores_by, start, step
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import Problem

PROBES = 8
"""Images of the probe. Their ids are negative: no image of the inversion shares their draws."""


@dataclass(frozen=True)
class Reading:
    """What attention says at a planned stop, mean over the probe.

    Attributes:
        spread: exp(entropy) over the number of patches, in (0, 1]; 1 is flat.
        stability: overlap above chance, in [0, 1].
    """

    spread: float
    stability: float


def adapted_schedule(problem: Problem, *, multi_label: bool = False) -> StopSchedule:
    """The planned schedule, with ratios no higher than this teacher's attention bears.

    Args:
        problem: its configuration has the planned schedule.
        multi_label: whether the teacher's targets are (b, classes).
    """
    patches = problem.teacher.grid[0] * problem.teacher.grid[1]
    planned = problem.config.schedule.kept_counts(patches)
    planned = [pair for pair in planned if pair[1] < patches]
    readings = read_attention(problem, planned, multi_label=multi_label)
    stops, going = [], patches
    for (iteration, count), reading in zip(planned, readings, strict=True):
        share = 1 - reading.stability * (1 - max(count / patches, reading.spread))
        least = math.ceil(share * patches - 1e-9)
        if least < going:
            stops.append((iteration, 1 - least / going))
            going = least
    return StopSchedule(tuple(stops))


def read_attention(problem: Problem, stops: list[tuple[int, int]], *, multi_label: bool = False) -> list[Reading]:
    """One reading for each (iteration, patches that would go on), iterations rising, from a dense probe.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    ids = -1 - torch.arange(PROBES, device=problem.teacher.mean.device)
    config = replace(problem.config, schedule=StopSchedule(), leaving=Last())
    problem = replace(problem, config=config, warm=None)
    size = min(PROBES, config.batch_size) if isinstance(config.batch_size, int) else PROBES
    while True:
        try:
            looks = [_looks(problem, part, stops, multi_label) for part in ids.split(size)]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            continue
        both = [(torch.cat([part[i][0] for part in looks]), torch.cat([part[i][1] for part in looks]))
                for i in range(len(stops))]  # fmt: skip
        return [
            # Nothing moved before a stop at 0: two looks at the same noise say nothing.
            reading(*pair, count) if iteration else Reading(reading(*pair, count).spread, 0.0)
            for pair, (iteration, count) in zip(both, stops, strict=True)
        ]


def _looks(
    problem: Problem, ids: Tensor, stops: list[tuple[int, int]], multi_label: bool
) -> list[tuple[Tensor, Tensor]]:
    """For each stop the importance (b, n) half-way since the one before, and at it."""
    teacher = problem.teacher
    classes = (-1 - ids) % teacher.classes
    state = start(problem, ids, F.one_hot(classes, teacher.classes).to(teacher.mean) if multi_label else classes)
    touching = neighbours(state.kept, teacher.grid)
    looks, before = [], 0
    for iteration, _ in stops:
        half_way = (before + iteration) // 2
        for _ in range(half_way - before):
            step(problem, state, touching)
        earlier = scores_by(problem, state, "attention")
        for _ in range(iteration - half_way):
            step(problem, state, touching)
        looks.append((earlier, scores_by(problem, state, "attention")))
        before = iteration
    return looks


def probe_cost(problem: Problem) -> dict[int, int]:
    """Iterations of single images that the probe takes, by the number of patches they keep: all.

    Its looks at attention, two forward passes for each stop, are not counted.
    """
    stops = problem.config.schedule.stops
    return {problem.teacher.grid[0] * problem.teacher.grid[1]: PROBES * stops[-1][0]} if stops else {}


def reading(earlier: Tensor, now: Tensor, count: int) -> Reading:
    """What two looks at the importance (b, n) of the same patches say, if `count` of them went on."""
    n = now.shape[1]
    shares = now.double().clamp(min=0) + 1e-12
    shares = shares / shares.sum(1, keepdim=True)
    spread = (-(shares * shares.log()).sum(1)).exp() / n
    top = [torch.zeros_like(each, dtype=torch.bool).scatter(1, each.topk(count).indices, value=True) for each in
           (earlier, now)]  # fmt: skip
    overlap = (top[0] & top[1]).sum(1).double() / count
    chance = count / n
    stability = (overlap - chance) / max(1 - chance, 1e-12)
    return Reading(float(spread.mean()), float(stability.mean().clamp(0, 1)))
