"""What an inversion is about, and where a batch of it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smi_fed.inversion.acceleration import uncompiled
from smi_fed.inversion.batch_norm import Seen, input_statistics
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.optimiser import Moments
from smi_fed.inversion.parametrisation import Parameters, Parametrisation
from smi_fed.inversion.teacher import Teacher
from smi_fed.sparse_images import SparseImages

FLOAT16_SCALE = 2.0**8
"""Gradients in float16 lie between 6e-8, where an image that the teacher is sure of gets, and 65504."""


@dataclass
class State:
    """All there is to know of a batch in work; the loop keeps nothing anywhere else.

    The images of a state keep the same number k of patches. Tensors, images first: ids (b,),
    targets (b,) or (b, classes), age (b,) in iterations, kept (b, k) ascending,
    canvas (b, n, c, ph, pw) normalised pixels of stopped patches, stopped_at (b, n); for
    early stop level and lowest (b,), a smoothed loss and its least value, and lowest_at (b,),
    the age at that; for rebirth snapshots (b, s, n, c, ph, pw) of finished images.
    """

    ids: Tensor
    targets: Tensor
    age: Tensor
    parameters: Parameters
    moments: Moments
    kept: Tensor
    canvas: Tensor
    stopped_at: Tensor
    level: Tensor
    lowest: Tensor
    lowest_at: Tensor
    snapshots: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` made to every tensor, such as some of the rows or another device."""
        return State.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence[State]) -> State:
        """One batch of several that keep the same number of patches."""
        named = [part.tensors() for part in parts]
        return cls.from_tensors({name: torch.cat([each[name] for each in named]) for name in named[0]})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file; undone by `from_tensors`."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("parameters", "moments")}
        groups = {"parameters": self.parameters, "first": self.moments.first, "second": self.moments.second}
        return named | {f"{group}.{name}": t for group, own in groups.items() for name, t in own.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """A state from what `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
        """

        def group(prefix: str) -> Parameters:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        moments = Moments(group("first."), group("second."))
        plain = {f.name: tensors[f.name] for f in fields(cls) if f.name not in ("parameters", "moments")}
        return cls(parameters=group("parameters."), moments=moments, **plain)


@dataclass(frozen=True)
class Problem:
    """What is inverted and how: all that stays the same through the loop."""

    teacher: Teacher
    parametrisation: Parametrisation
    config: InversionConfig
    key: int
    statistics: FeatureStatistics | None
    warm: SparseImages | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """Where the teacher computes: a float32 one in bfloat16 if the settings say so; pixels keep their dtype."""
        if self.config.precision == "float32" or self.teacher.dtype != torch.float32:
            return nullcontext()
        return torch.autocast(self.teacher.mean.device.type, torch.bfloat16)

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by for a backward pass, and its gradients divided by; a power of two."""
        return FLOAT16_SCALE if self.teacher.dtype == torch.float16 else 1.0

    def is_open(self, state: State) -> bool:
        """Whether no stop is to come in `state`: its images may leave, and others of its kind join."""
        return state.kept.shape[1] == self.config.schedule.kept_counts(state.canvas.shape[1])[-1][1]

    @contextmanager
    def listening(self) -> Iterator[list[Seen]]:
        """Where the BatchNorm layers tell what they are shown, if the settings have that prior."""
        if not self.config.batchnorm:
            yield []
            return
        with uncompiled(self.config), input_statistics(self.teacher.backbone) as seen:
            yield seen
