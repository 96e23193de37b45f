"""Images that have converged leave their batch, and new ones enter: continuous batching.

The paper gives every image the same number of iterations. Here an image is done when its
loss, smoothed, has not fallen by a share `tolerance` for `patience` iterations (`Converged`). It is held
still from that iteration on, so its pixels do not depend on when the batch is cleared; only
with a prior that couples a batch do they depend on who shared it. No image converges before
its last patches have stopped, since the loss jumps at a stop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smi_fed.inversion.choices import Converged
from smi_fed.inversion.state import Problem, State

SMOOTHING = 0.1
"""Weight of the newest loss: views are random, and so is a single loss."""

CLEARING = 0.25
"""Share of a batch that has to be done before it is cleared; clearing waits for the device."""

INTERVAL = 4
"""Iterations between two looks at how many are done."""


def rule(problem: Problem) -> Converged | None:
    """When images leave before their last iteration; None where they do not."""
    leaving = problem.config.leaving
    return leaving if isinstance(leaving, Converged) else None


def done(problem: Problem, state: State) -> Tensor:
    """Which images (b,) go no further."""
    aged, leaving = state.age >= problem.config.iterations, rule(problem)
    if leaving is None or not problem.is_open(state):
        return aged
    return aged | (state.age - state.lowest_at >= leaving.patience)


@torch.no_grad()
def note(problem: Problem, state: State, loss: Tensor, still: Tensor) -> None:
    """Remember the lowest smoothed loss (b,) of each image that is not `still`, and the age at which it was met."""
    state.level = loss.where(state.level.isnan(), torch.lerp(state.level, loss.to(state.level), SMOOTHING))
    leaving = rule(problem)
    assert leaving is not None
    better = (state.level < state.lowest * (1 - leaving.tolerance)) & ~still
    state.lowest = state.level.where(better, state.lowest)
    state.lowest_at = state.age.where(better, state.lowest_at)


def forget(state: State) -> None:
    """After a stop the loss is another one."""
    state.level = torch.full_like(state.level, math.nan)
    state.lowest = torch.full_like(state.lowest, math.inf)
    state.lowest_at = state.age.clone()


def worth_clearing(problem: Problem, state: State, iteration: int) -> bool:
    """Whether so many images are done that others should take their places.

    Waits for the device, so it looks only every few iterations.
    """
    if iteration % INTERVAL:
        return False
    return int(done(problem, state).sum()) >= max(1, math.ceil(CLEARING * len(state.ids)))
