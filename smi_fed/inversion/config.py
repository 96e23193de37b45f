"""Settings of one inversion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from smi_fed.checks import is_integer, is_number, require, require_choice
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.selections import SELECTIONS

PAPER_SCHEDULE = StopSchedule(((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3)))


@dataclass(frozen=True)
class InversionConfig:
    """Settings of `invert`; the defaults are the paper's (section 4, 'Implementation').

    Args:
        iterations: optimiser steps per image.
        schedule: when patches stop, a `StopSchedule` or its text; empty is dense.
        learning_rate: Adam's, above 0.
        learning_rate_decay: constant | cosine (to 0 at the last iteration).
        betas: Adam's decay of the two moments, each in [0, 1).
        parametrisation: pixels | pyramid.
        levels, start_scale: of the pyramid, see `Pyramid`.
        background: frozen (a stopped patch holds its pixels bit for bit) | rendered (a
            pyramid goes on filling it).
        selection: which patches go on, a name in `SELECTIONS`.
        rebirth: at a stop the best patches detach as a finished image and the others go on;
            a target gives one image more than there are stops.
        adaptive: soften the schedule where the teacher's attention is flat or unstable, see
            `adapted_schedule`.
        patience: iterations without progress after which an image has converged and makes
            room for another; 0 is off.
        tolerance: least progress, as a share of the loss, inside [0, 1).
        tv: weight of total variation, >= 0.
        statistics: weight of the feature-statistics prior, >= 0; above 0 `invert` needs
            statistics.
        batchnorm: weight of the BatchNorm-statistics prior (DeepInversion), >= 0; above 0
            `invert` needs a model with BatchNorm, which runs uncompiled.
        jitter: largest cyclic shift per axis in pixels; once patches have stopped, whole
            patches only.
        flip: mirror views at random.
        batch_size: images optimised together; auto chooses from the device's free memory
            (not where a prior couples the images, so that the batch is part of the result).
            Without such a prior a batch that does not fit is halved and goes on.
        precision: float32 | bfloat16 (autocast of the teacher; pixels keep their dtype).
        compile: let `torch.compile` fuse the teacher's blocks; on CPU it gains nothing.
        patch_size: grid for models without patch tokens.

    Raises:
        ValueError: a value that cannot be, with key, value and what is allowed.
    """

    iterations: int = 4000
    schedule: StopSchedule = PAPER_SCHEDULE
    learning_rate: float = 0.25
    learning_rate_decay: str = "constant"
    betas: tuple[float, float] = (0.5, 0.99)
    parametrisation: str = "pixels"
    levels: tuple[int, ...] = (4, 8)
    start_scale: float = 0.1
    background: str = "frozen"
    selection: str = "attention"
    rebirth: bool = False
    adaptive: bool = False
    patience: int = 0
    tolerance: float = 0.01
    tv: float = 1e-4
    statistics: float = 0.0
    batchnorm: float = 0.0
    jitter: int = 30
    flip: bool = True
    batch_size: int | str = 64
    precision: str = "float32"
    compile: bool = False
    patch_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", StopSchedule.parse(self.schedule))
        for key in ("betas", "levels"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        self._check_numbers()
        self._check_choices()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for key, least in {"iterations": 1, "jitter": 0, "patience": 0}.items():
            value = getattr(self, key)
            require(is_integer(value) and value >= least, key, value, f"an int >= {least}")
        size = self.batch_size
        good = size == "auto" if isinstance(size, str) else is_integer(size) and size > 0
        require(good, "batch_size", size, "an int >= 1 or auto")
        for key in ("tv", "statistics", "batchnorm", "start_scale"):
            value = getattr(self, key)
            require(is_number(value) and value >= 0, key, value, "a number >= 0")
        require(is_number(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        good = len(self.betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(good, "betas", self.betas, "two numbers in [0, 1)")
        good = len(self.levels) > 0 and all(is_integer(level) and level > 0 for level in self.levels)
        require(good and len(set(self.levels)) == len(self.levels), "levels", self.levels, "different ints >= 1")
        good = is_number(self.tolerance) and 0 <= self.tolerance < 1
        require(good, "tolerance", self.tolerance, "a number in [0, 1)")
        size = self.patch_size
        require(size is None or (is_integer(size) and size > 0), "patch_size", size, "an int >= 1 or null")

    def _check_choices(self) -> None:
        require_choice("learning_rate_decay", self.learning_rate_decay, ("constant", "cosine"))
        require_choice("parametrisation", self.parametrisation, ("pixels", "pyramid"))
        require_choice("background", self.background, ("frozen", "rendered"))
        require_choice("selection", self.selection, SELECTIONS)
        require_choice("precision", self.precision, ("float32", "bfloat16"))
        for key in ("flip", "compile", "rebirth", "adaptive"):
            require(isinstance(getattr(self, key), bool), key, getattr(self, key), "true | false")

    def _check_combinations(self) -> None:
        late = [iteration for iteration, _ in self.schedule.stops if iteration >= self.iterations]
        require(not late, "schedule", str(self.schedule), f"stops before the last iteration, {self.iterations}")
        free = self.parametrisation == "pixels" and self.background == "rendered"
        require(not free, "background", self.background, "frozen, where parametrisation is pixels")
        both = self.rebirth and self.adaptive
        require(not both, "adaptive", True, "false, where rebirth is true: a softer schedule gives fewer images")
        mirrored = self.statistics > 0 and self.flip
        for key in ("statistics", "batchnorm"):
            chosen = getattr(self, key) > 0 and self.batch_size == "auto"
            require(not chosen, "batch_size", "auto", f"an int, where {key} > 0: the prior couples a batch's images")
        require(not mirrored, "flip", self.flip, "false, where statistics > 0: the prior compares positions")

    @property
    def couples(self) -> bool:
        """Whether a prior makes the composition of a batch part of its images."""
        return self.statistics > 0 or self.batchnorm > 0

    @classmethod
    def paper(cls, **changes: Any) -> InversionConfig:
        """The paper's setting, with `changes`."""
        return cls(**changes)

    @classmethod
    def dense(cls, **changes: Any) -> InversionConfig:
        """The paper's setting without any stop, with `changes`."""
        return cls(**{"schedule": StopSchedule(), **changes})

    def scaled(self, iterations: int) -> InversionConfig:
        """The same with another number of iterations, and stops moved in proportion."""
        return replace(self, iterations=iterations, schedule=self.schedule.scaled(iterations / self.iterations))

    @property
    def summary(self) -> str:
        """The method in words, for logs and reports."""
        parts = [f"{self.selection} selection", self.parametrisation, f"stops '{self.schedule}'"]
        parts += ["rebirth"] * self.rebirth + ["adaptive schedule"] * self.adaptive
        parts += [f"early stop after {self.patience} iterations"] * (self.patience > 0)
        return ", ".join(parts)
