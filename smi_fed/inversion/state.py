"""Where a batch stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Named tensors with the images of the batch first."""

GROUPS = ("parameters", "first", "second", "stopping", "leaving")


@dataclass
class State:
    """All there is to know of a batch in work; the loop keeps nothing anywhere else.

    The images of a state keep the same number k of patches. Tensors, images first: ids (b,),
    targets (b,) or (b, classes), age (b,) in iterations, kept (b, k) ascending,
    canvas (b, n, c, ph, pw) normalised pixels of stopped patches, stopped_at (b, n). Groups
    of tensors: the parameters, Adam's first and second moments of them, and what the rules of
    stopping and leaving remember of each image.
    """

    ids: Tensor
    targets: Tensor
    age: Tensor
    kept: Tensor
    canvas: Tensor
    stopped_at: Tensor
    parameters: Tensors
    first: Tensors
    second: Tensors
    stopping: Tensors = field(default_factory=dict)
    leaving: Tensors = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` made to every tensor, such as some of the rows or another device."""
        return State.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence[State]) -> State:
        """One batch of several that keep the same number of patches."""
        named = [part.tensors() for part in parts]
        return cls.from_tensors({name: torch.cat([each[name] for each in named]) for name in named[0]})

    def tensors(self) -> Tensors:
        """All tensors by name, for a file; undone by `from_tensors`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in GROUPS}
        return plain | {f"{group}.{name}": t for group in GROUPS for name, t in getattr(self, group).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """A state from what `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        found: dict[str, Any] = {f.name: tensors[f.name] for f in fields(cls) if f.name not in GROUPS}
        for group in GROUPS:
            found[group] = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{group}.")}
        return cls(**found)
