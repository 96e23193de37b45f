"""When an image is done; the paper's: after the last iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from smi_fed.checks import checked
from smi_fed.inversion.state import State

CLEARING = 0.25
"""Share of a batch that has to be done before others take the places; clearing waits for the device."""


@dataclass(frozen=True)
class Tally:
    """Where the batches of an inversion stand, in numbers that take no waiting for the device.

    Attributes:
        iterations: of an image; size: images of the next batch.
        images: to invert; following: of them begun.
        finished: batches; begun: images of each batch in work.
        age: of the youngest image of the batch in hand.
    """

    iterations: int
    size: int
    images: int
    following: int
    finished: int
    begun: tuple[int, ...]
    age: int


class LeavingRule(Protocol):
    """One answer to when an image is done; a settings class of its own, with a `kind`.

    What it remembers of each image stands in `State.leaving`.
    """

    @property
    def summary(self) -> str:
        """The rule in words; empty for the paper's."""
        ...

    def start(self, state: State) -> None:
        """Begin to watch the images of `state`; anew after each stop, since a stop changes the loss."""
        ...

    def note(self, state: State, loss: Tensor, still: Tensor) -> None:
        """What an iteration showed: the loss (b,), and which images (b,) were `still`."""
        ...

    def converged(self, state: State) -> Tensor:
        """Which images (b,) are done before their last iteration; asked once no stop is to come."""
        ...

    def makes_room(self, state: State, iteration: int) -> bool:
        """Whether so many images are done that others should take their places."""
        ...

    @property
    def refills(self) -> bool:
        """Whether others take the places of images that are done, so that batches are joined."""
        ...

    def position(self, tally: Tally) -> tuple[int, int]:
        """Iterations done and of all batches."""
        ...


@checked
class Last:
    """An image is done after the last iteration (the paper's)."""

    kind: Literal["last"] = field(default="last", kw_only=True)
    summary: ClassVar[str] = ""
    refills: ClassVar[bool] = False

    def start(self, state: State) -> None:
        pass

    def note(self, state: State, loss: Tensor, still: Tensor) -> None:
        pass

    def converged(self, state: State) -> Tensor:
        return torch.zeros_like(state.ids, dtype=torch.bool)

    def makes_room(self, state: State, iteration: int) -> bool:
        return False

    def position(self, tally: Tally) -> tuple[int, int]:
        """To the iteration: a batch stays together."""
        batches = tally.finished + len(tally.begun) - (-(tally.images - tally.following) // tally.size)
        return tally.finished * tally.iterations + tally.age, batches * tally.iterations
