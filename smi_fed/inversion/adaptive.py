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

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_fed.inversion.augment import clean_view
from smi_fed.inversion.loop import start, step
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import Problem, State

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
    readings = read_attention(problem, [(at, count) for at, count in planned], multi_label=multi_label)
    stops, before = [], 1.0
    for (iteration, count), reading in zip(planned, readings, strict=True):
        share = 1 - reading.stability * (1 - max(count / patches, reading.spread))
        if before - share >= 1 / patches:
            stops.append((iteration, 1 - share / before))
            before = share
    return StopSchedule(tuple(stops))


def read_attention(problem: Problem, stops: list[tuple[int, int]], *, multi_label: bool = False) -> list[Reading]:
    """One reading for each (iteration, patches that would go on), from a dense probe."""
    teacher = problem.teacher
    config = replace(problem.config, schedule=StopSchedule(), patience=0)
    problem = replace(problem, config=config, warm=None)
    ids = -1 - torch.arange(PROBES, device=teacher.mean.device)
    classes = torch.arange(PROBES, device=ids.device) % teacher.classes
    state = start(problem, ids, F.one_hot(classes, teacher.classes).to(teacher.mean) if multi_label else classes)
    touching = neighbours(state.kept, teacher.grid)
    readings, before = [], 0
    for iteration, count in stops:
        half_way = (before + iteration) // 2
        for _ in range(half_way - before):
            step(problem, state, touching)
        earlier = _importance(problem, state)
        for _ in range(iteration - half_way):
            step(problem, state, touching)
        readings.append(reading(earlier, _importance(problem, state), count))
        before = iteration
    return readings


def probe_cost(problem: Problem) -> dict[int, int]:
    """Iterations of single images that the probe takes, by the number of patches they keep: all."""
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


def _importance(problem: Problem, state: State) -> Tensor:
    with torch.no_grad():
        patches = problem.parametrisation.patches(state.parameters, state.kept)
    with problem.autocast():
        return problem.teacher.importance(clean_view(patches, state.kept, state.canvas, problem.teacher), state.targets)
