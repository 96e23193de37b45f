"""What an inversion computes, counted and not estimated."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.loop import Problem, parametrise, start, step, stop_patches
from smi_fed.inversion.losses import FeatureStatistics, neighbours
from smi_fed.inversion.teacher import adapt, frozen


def trajectory_flops(model: nn.Module, config: InversionConfig, statistics: FeatureStatistics | None = None) -> int:
    """FLOPs of one image from start to end: forward, backward and the passes at stops.

    Runs one iteration per stage on one image under `torch.utils.flop_counter` (a
    multiply-add counts two) and multiplies by the iterations of that stage.
    """
    teacher = adapt(model, config.patch_size)
    known = statistics.to(teacher.mean) if statistics is not None and config.statistics > 0 else None
    problem = Problem(teacher, parametrise(teacher, config), config, 0, known)
    device = teacher.mean.device
    ids, targets = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
    total = 0
    with frozen(model):
        state = start(problem, ids, targets)
        counts = config.schedule.kept_counts(state.canvas.shape[1])
        ends = [iteration for iteration, _ in counts[1:]] + [config.iterations]
        for (begin, count), end in zip(counts, ends, strict=True):
            with FlopCounterMode(display=False) as counter:
                if count < state.kept.shape[1]:
                    stop_patches(problem, state, count)
            total += counter.get_total_flops()
            touching = neighbours(state.kept, teacher.grid)
            with FlopCounterMode(display=False) as counter:
                step(problem, state, touching)
            total += counter.get_total_flops() * (end - begin)
    return total
