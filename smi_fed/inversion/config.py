"""Settings of one inversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from smi_fed.checks import (
    Allowed,
    Betas,
    Choice,
    Count,
    Flag,
    Natural,
    NonNegative,
    Positive,
    Text,
    checked,
    one_of,
    require,
)
from smi_fed.inversion.adaptive import Adaptive
from smi_fed.inversion.early_stop import Converged
from smi_fed.inversion.leaving import Last
from smi_fed.inversion.parametrisation import PixelsConfig, PyramidConfig
from smi_fed.inversion.planning import Fixed
from smi_fed.inversion.rebirth import Rebirth
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.selections import SELECTIONS
from smi_fed.inversion.stopping import Keep

ParametrisationChoice = Annotated[PixelsConfig | PyramidConfig, Choice()]
Stopping = Annotated[Keep | Rebirth, Choice()]
Leaving = Annotated[Last | Converged, Choice()]
Planning = Annotated[Fixed | Adaptive, Choice()]

PAPER_SCHEDULE = StopSchedule(((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3)))


def _read_schedule(value: Any) -> Any:
    return StopSchedule.parse(value) if isinstance(value, str) else value


@checked
class InversionConfig:
    """Settings of `invert`; the defaults are the paper's (section 4, 'Implementation').

    Args:
        iterations: optimiser steps per image.
        schedule: when patches stop, a `StopSchedule` or its text; empty is dense.
        learning_rate: Adam's, above 0.
        learning_rate_decay: constant | cosine (to 0 at the last iteration).
        betas: Adam's decay of the two moments, each in [0, 1).
        parametrisation: how an image is written down, pixels | pyramid: a `PixelsConfig` or a
            `PyramidConfig`. Of this and the other choices the kind alone, as a text, stands for
            its defaults.
        background: frozen (a stopped patch holds its pixels bit for bit) | rendered (a
            pyramid goes on filling it).
        selection: which patches go on, a name in `SELECTIONS`.
        stopping: what a stop does, keep | rebirth: a `Keep` or a `Rebirth`.
        leaving: when an image is done, last | converged: a `Last` or a `Converged`.
        planning: whose schedule it is, fixed | adaptive: a `Fixed` or an `Adaptive`.
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
        SettingError: values that cannot be, each with key, value and what is allowed.
    """

    iterations: Count = 4000
    schedule: Annotated[StopSchedule, BeforeValidator(_read_schedule)] = PAPER_SCHEDULE
    learning_rate: Positive = 0.25
    learning_rate_decay: Literal["constant", "cosine"] = "constant"
    betas: Betas = (0.5, 0.99)
    parametrisation: ParametrisationChoice = PixelsConfig()
    background: Literal["frozen", "rendered"] = "frozen"
    selection: Annotated[Text, one_of(SELECTIONS)] = "attention"
    stopping: Stopping = Keep()
    leaving: Leaving = Last()
    planning: Planning = Fixed()
    tv: NonNegative = 1e-4
    statistics: NonNegative = 0.0
    batchnorm: NonNegative = 0.0
    jitter: Natural = 30
    flip: Flag = True
    batch_size: Annotated[Count | Literal["auto"], Allowed("an int >= 1 or auto")] = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: Flag = False
    patch_size: Annotated[Count | None, Allowed("an int >= 1 or null")] = None

    def __post_init__(self) -> None:
        late = [iteration for iteration, _ in self.schedule.stops if iteration >= self.iterations]
        require(not late, "schedule", str(self.schedule), f"stops before the last iteration, {self.iterations}")
        free = isinstance(self.parametrisation, PixelsConfig) and self.background == "rendered"
        require(not free, "background", self.background, "frozen, where parametrisation is pixels")
        both = self.stopping.kind == "rebirth" and self.planning.kind == "adaptive"
        allowed = "fixed, where stopping is rebirth: a softer schedule gives fewer images"
        require(not both, "planning", self.planning.kind, allowed)
        for key in ("statistics", "batchnorm"):
            chosen = getattr(self, key) > 0 and self.batch_size == "auto"
            require(not chosen, "batch_size", "auto", f"an int, where {key} > 0: the prior couples a batch's images")
        mirrored = self.statistics > 0 and self.flip
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

    def images_per_target(self, patches: int) -> int:
        """Finished images of one target, for a teacher of that many patches."""
        return self.stopping.images([patches, *(count for _, count in self.schedule.kept_counts(patches))])

    @property
    def summary(self) -> str:
        """The method in words, for logs and reports."""
        rules = (self.stopping, self.planning, self.leaving)
        words = [rule.summary for rule in rules if rule.summary]
        return ", ".join([f"{self.selection} selection", self.parametrisation.kind, f"stops '{self.schedule}'", *words])
