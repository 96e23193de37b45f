"""Images that have converged leave their batch, and new ones enter: continuous batching.

The paper gives every image the same number of iterations. Here an image is done when its
loss, smoothed, has not fallen by a share `tolerance` for `patience` iterations. It is held
still from that iteration on, so its pixels do not depend on when the batch is cleared; only
with a prior that couples a batch do they depend on who shared it. No image converges before
its last patches have stopped, since the loss jumps at a stop.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smi_fed.checks import Count, Fraction, checked
from smi_fed.inversion.leaving import CLEARING, Tally
from smi_fed.inversion.state import State

SMOOTHING = 0.1
"""Weight of the newest loss: views are random, and so is a single loss."""

INTERVAL = 4
"""Iterations between two looks at how many are done."""


@checked
class Converged:
    """An image is done when it has converged, or after the last iteration; it makes room for another.

    It remembers of each image `level` (b,), the smoothed loss, `lowest` (b,), the least value
    of it, and `lowest_at` (b,), the age at that.

    Args:
        patience: iterations without progress after which it has converged, >= 1.
        tolerance: least progress, as a share of the loss, in [0, 1).
    """

    kind: Literal["converged"] = field(default="converged", kw_only=True)
    refills: ClassVar[bool] = True
    patience: Count = 10
    tolerance: Fraction = 0.01

    @property
    def summary(self) -> str:
        return f"early stop after {self.patience} iterations"

    def start(self, state: State) -> None:
        level = torch.full_like(state.ids, math.nan, dtype=state.canvas.dtype)
        lowest = torch.full_like(level, math.inf)
        state.leaving = {"level": level, "lowest": lowest, "lowest_at": state.age.clone()}

    @torch.no_grad()
    def note(self, state: State, loss: Tensor, still: Tensor) -> None:
        level, lowest, lowest_at = (state.leaving[name] for name in ("level", "lowest", "lowest_at"))
        level = loss.where(level.isnan(), torch.lerp(level, loss.to(level), SMOOTHING))
        better = (level < lowest * (1 - self.tolerance)) & ~still
        lowest, lowest_at = level.where(better, lowest), state.age.where(better, lowest_at)
        state.leaving = {"level": level, "lowest": lowest, "lowest_at": lowest_at}

    def converged(self, state: State) -> Tensor:
        return state.age - state.leaving["lowest_at"] >= self.patience

    def makes_room(self, state: State, iteration: int) -> bool:
        """Waits for the device, so it looks only every few iterations."""
        if iteration % INTERVAL:
            return False
        return int(self.converged(state).sum()) >= max(1, math.ceil(CLEARING * len(state.ids)))

    def position(self, tally: Tally) -> tuple[int, int]:
        """In proportion to what is done of each image: batches never end."""
        going, total = sum(tally.begun), -(-tally.images // tally.size) * tally.iterations
        done = (tally.following - going) * tally.iterations + going * tally.age
        return round(total * done / (tally.images * tally.iterations)), total
