"""What an inversion is about: all that stays the same through the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smi_fed.inversion.acceleration import uncompiled
from smi_fed.inversion.batch_norm import Seen, input_statistics
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.parametrisation import Parametrisation
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import State
from smi_fed.inversion.teacher import Teacher, adapt
from smi_fed.sparse_images import SparseImages

FLOAT16_SCALE = 2.0**8
"""Gradients in float16 lie between 6e-8, where an image that the teacher is sure of gets, and 65504."""


@dataclass(frozen=True)
class Problem:
    """What is inverted and how. Made by `pose`."""

    teacher: Teacher
    parametrisation: Parametrisation
    config: InversionConfig
    key: int
    statistics: FeatureStatistics | None
    warm: SparseImages | None = None

    def under(self, schedule: StopSchedule) -> Problem:
        """The same under another schedule."""
        return replace(self, config=replace(self.config, schedule=schedule))

    def autocast(self) -> AbstractContextManager[object]:
        """Where the teacher computes: a float32 one in bfloat16 if the settings say so; pixels keep their dtype."""
        if self.config.precision == "float32" or self.teacher.dtype != torch.float32:
            return nullcontext()
        return torch.autocast(self.teacher.mean.device.type, torch.bfloat16)

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by for a backward pass, and its gradients divided by; a power of two."""
        return FLOAT16_SCALE if self.teacher.dtype == torch.float16 else 1.0

    def in_last_stage(self, state: State) -> bool:
        """Whether no stop is to come: images may leave, and others of the last stage may join."""
        return state.kept.shape[1] == self.config.schedule.kept_counts(state.canvas.shape[1])[-1][1]

    def done(self, state: State) -> Tensor:
        """Which images (b,) go no further: after the last iteration, or converged after the last stop."""
        aged = state.age >= self.config.iterations
        return aged | self.config.leaving.converged(state) if self.in_last_stage(state) else aged

    @contextmanager
    def listening(self) -> Iterator[list[Seen]]:
        """Where the BatchNorm layers tell what they are shown, if the settings have that prior."""
        if not self.config.batchnorm:
            yield []
            return
        with uncompiled(self.config), input_statistics(self.teacher.backbone) as seen:
            yield seen


def pose(
    model: nn.Module,
    config: InversionConfig,
    key: int = 0,
    statistics: FeatureStatistics | None = None,
    warm: SparseImages | None = None,
) -> Problem:
    """The problem of inverting `model`; its images are drawn by `key`, see `randomness`.

    Made before `accelerated`, under which weights may be of another dtype than the model's.

    Args:
        statistics: what the feature-statistics prior compares with; unused where its weight is 0.
        warm: images to start from, see `invert`.

    Raises:
        ValueError: the model or its patch size cannot be, see `adapt`.
    """
    teacher = adapt(model, config.patch_size)
    known = statistics.to(teacher.mean) if statistics is not None and config.statistics > 0 else None
    return Problem(teacher, config.parametrisation.build(teacher), config, key, known, warm)
