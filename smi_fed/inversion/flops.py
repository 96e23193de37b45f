"""What an inversion computes, counted and not estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.loop import start, step, stop_patches
from smi_fed.inversion.losses import FeatureStatistics, neighbours
from smi_fed.inversion.problem import pose
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.teacher import adapt, frozen


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one image between two stops.

    Attributes:
        begin, end: iterations; kept: patches in work.
        iteration: forward and backward of one iteration.
        stop: the importance pass that opens the stage.
    """

    begin: int
    end: int
    kept: int
    iteration: int
    stop: int

    @property
    def total(self) -> int:
        """FLOPs of the whole stage."""
        return self.stop + (self.end - self.begin) * self.iteration


def trajectory_flops(model: nn.Module, config: InversionConfig, statistics: FeatureStatistics | None = None) -> int:
    """FLOPs of one image from start to end: forward, backward and the passes at stops."""
    return sum(stage.total for stage in stage_flops(model, config, statistics))


def spent_flops(
    model: nn.Module,
    config: InversionConfig,
    spent: Mapping[int, int],
    trajectories: int,
    statistics: FeatureStatistics | None = None,
) -> int:
    """FLOPs of an inversion that was run, whatever its images took each.

    Args:
        spent: iterations of single images by the patches they kept, see `InversionProgress`.
        trajectories: targets that were inverted; each passes every stop once.
    """
    rows, columns = adapt(model, config.patch_size).grid
    counts = [rows * columns, *(count for count in sorted(spent, reverse=True) if count < rows * columns)]
    stops = tuple((at + 1, 1 - after / before) for at, (before, after) in enumerate(pairwise(counts)))
    config = replace(config, schedule=StopSchedule(stops), iterations=len(counts) + 1)
    stages = stage_flops(model, config, statistics)
    return sum(spent.get(stage.kept, 0) * stage.iteration + trajectories * stage.stop for stage in stages)


def stage_flops(
    model: nn.Module, config: InversionConfig, statistics: FeatureStatistics | None = None
) -> list[StageFlops]:
    """FLOPs by stage, from running one iteration of each on one image.

    Counted by `torch.utils.flop_counter`, where a multiply-add counts two.
    """
    problem = pose(model, config, statistics=statistics)
    ids, targets = (torch.zeros(1, dtype=torch.long, device=problem.teacher.mean.device) for _ in range(2))
    stages = []
    with frozen(model):
        state = start(problem, ids, targets)
        counts = config.schedule.kept_counts(state.canvas.shape[1])
        ends = [iteration for iteration, _ in counts[1:]] + [config.iterations]
        for (begin, count), end in zip(counts, ends, strict=True):
            with FlopCounterMode(display=False) as at_stop:
                if count < state.kept.shape[1]:
                    stop_patches(problem, state, count)
            touching = neighbours(state.kept, problem.teacher.grid)
            with FlopCounterMode(display=False) as at_iteration:
                step(problem, state, touching)
            stages.append(StageFlops(begin, end, count, at_iteration.get_total_flops(), at_stop.get_total_flops()))
    return stages
