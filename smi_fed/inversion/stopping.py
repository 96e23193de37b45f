"""What a stop does with the scores of patches; the paper's: the best go on, the others keep their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from smi_fed.checks import checked
from smi_fed.inversion.selections import best
from smi_fed.inversion.state import State


class StoppingRule(Protocol):
    """One thing to do at a stop; a settings class of its own, with a `kind`.

    What it remembers of each image stands in `State.stopping`.
    """

    @property
    def summary(self) -> str:
        """The rule in words; empty for the paper's."""
        ...

    def images(self, counts: Sequence[int]) -> int:
        """Finished images of one target whose patches in work are `counts` in turn, falling."""
        ...

    def start(self, state: State) -> None:
        """Before the first iteration."""
        ...

    def going_on(self, scores: Tensor, count: int) -> Tensor:
        """Indices (b, count), ascending, of the patches that go on, by scores (b, k)."""
        ...

    def emit(self, state: State, shown: Tensor) -> None:
        """At a stop, before patches leave; `shown` (b, n, c, ph, pw) is the image as it stands."""
        ...

    def finished(self, state: State, shown: Tensor) -> tuple[Tensor, Tensor]:
        """All images (b, images, n, c, ph, pw) of each target, and when each patch stopped (b, images, n).

        Args:
            shown: the last one, (b, n, c, ph, pw).
        """
        ...


@checked
class Keep:
    """At a stop the best patches go on and the others keep their pixels (the paper's)."""

    kind: Literal["keep"] = field(default="keep", kw_only=True)
    summary: ClassVar[str] = ""

    def images(self, counts: Sequence[int]) -> int:
        return 1

    def start(self, state: State) -> None:
        pass

    def going_on(self, scores: Tensor, count: int) -> Tensor:
        return best(scores, count)

    def emit(self, state: State, shown: Tensor) -> None:
        pass

    def finished(self, state: State, shown: Tensor) -> tuple[Tensor, Tensor]:
        return shown[:, None], state.stopped_at[:, None]
