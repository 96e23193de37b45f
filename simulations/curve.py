"""A student's accuracy over the steps and seconds of its distillation."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from simulations.methods import clock

LOOKS = 20
"""Points of a curve after its start, closer to each other at first."""


class Curve:
    """What a student reaches while it is taught.

    Attributes:
        points: (steps done, seconds, accuracy in [0, 1]), the first before the first step. Seconds are those of `clock`
            without those of looking: on a CPU this thread's, beside which another may make lessons.

    Args:
        look: the student's accuracy; leaves it as it is.
        steps: how many there will be.
    """

    def __init__(self, look: Callable[[], float], steps: int, device: torch.device) -> None:
        self.look, self.device, self.away = look, device, 0.0
        self.due = sorted({round(steps * (place / LOOKS) ** 2) for place in range(1, LOOKS + 1)} - {0})
        self.points = [(0, 0.0, look())]
        self.begin = clock(device)

    def tell(self, done: int, **_: object) -> None:
        """Look, where it is time; what a `Bar` tells."""
        if self.due and done >= self.due[0]:
            self._look(done)

    def end(self, steps: int) -> None:
        """Look once more, where the last step was not seen."""
        if self.points[-1][0] < steps:
            self._look(steps)

    def _look(self, done: int) -> None:
        seconds, started = clock(self.device) - self.begin - self.away, self._own()
        self.points.append((done, seconds, self.look()))
        self.due = [step for step in self.due if step > done]
        self.away += self._own() - started

    def _own(self) -> float:
        return time.thread_time() if self.device.type == "cpu" else clock(self.device)
