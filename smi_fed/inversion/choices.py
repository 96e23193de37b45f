"""Settings of an inversion that are one of several kinds, each with the keys that it reads."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from smi_fed.checks import Allowed, Choice, Count, Fraction, NonNegative, checked, require


@checked
class PixelsConfig:
    """Every pixel on its own (the paper's), see `FreePixels`."""

    kind: Literal["pixels"] = field(default="pixels", kw_only=True)


@checked
class PyramidConfig:
    """Images of low frequency, see `Pyramid`.

    Args:
        levels: side lengths of the grids in coefficients, different ints >= 1.
        start_scale: standard deviation of the start's coefficients, >= 0.
    """

    kind: Literal["pyramid"] = field(default="pyramid", kw_only=True)
    levels: Annotated[tuple[Count, ...], Allowed("different ints >= 1")] = (4, 8)
    start_scale: NonNegative = 0.1

    def __post_init__(self) -> None:
        good = 0 < len(self.levels) == len(set(self.levels))
        require(good, "levels", self.levels, "different ints >= 1")


@checked
class Keep:
    """At a stop the best patches go on and the others keep their pixels (the paper's)."""

    kind: Literal["keep"] = field(default="keep", kw_only=True)


@checked
class Rebirth:
    """At a stop the best patches detach as a finished image and the others go on (PRI).

    A target gives one image more than there are stops.
    """

    kind: Literal["rebirth"] = field(default="rebirth", kw_only=True)


@checked
class Last:
    """An image is done after the last iteration (the paper's)."""

    kind: Literal["last"] = field(default="last", kw_only=True)


@checked
class Converged:
    """An image is done when it has converged, or after the last iteration; it makes room for another.

    Args:
        patience: iterations without progress after which it has converged, >= 1.
        tolerance: least progress, as a share of the loss, in [0, 1).
    """

    kind: Literal["converged"] = field(default="converged", kw_only=True)
    patience: Count = 10
    tolerance: Fraction = 0.01


@checked
class Fixed:
    """The schedule as it is written (the paper's)."""

    kind: Literal["fixed"] = field(default="fixed", kw_only=True)


@checked
class Adaptive:
    """The schedule, softened where the teacher's attention is flat or unstable, see `adapted_schedule`."""

    kind: Literal["adaptive"] = field(default="adaptive", kw_only=True)


ParametrisationChoice = Annotated[PixelsConfig | PyramidConfig, Choice()]
Stopping = Annotated[Keep | Rebirth, Choice()]
Leaving = Annotated[Last | Converged, Choice()]
Planning = Annotated[Fixed | Adaptive, Choice()]
