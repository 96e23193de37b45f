"""When patches stop, and how many."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smi_fed.checks import is_integer, is_number, require


@dataclass(frozen=True)
class StopSchedule:
    """At each listed iteration a share of the *remaining* patches stops for good.

    Args:
        stops: pairs (iteration >= 0, ratio inside (0, 1)), iterations strictly
            increasing. Empty is dense inversion.

    Raises:
        ValueError: naming the stop that cannot be.
    """

    stops: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        before = -1
        for iteration, ratio in self.stops:
            require(
                is_integer(iteration) and iteration > before,
                "schedule",
                str(self),
                f"strictly increasing iterations >= 0, not {iteration!r} after {before}"
                if before >= 0
                else f"iterations >= 0, not {iteration!r}",
            )
            good = is_number(ratio) and 0 < ratio < 1
            require(good, "schedule", str(self), f"ratios inside (0, 1), not {ratio!r}")
            before = iteration

    @classmethod
    def parse(cls, text: str) -> StopSchedule:
        """Read '50:0.3,100:0.3'; an empty text is dense.

        Raises:
            ValueError: the text does not have this form, or its stops cannot be.
        """
        stops = []
        for part in text.split(",") if text.strip() else []:
            iteration, colon, ratio = part.partition(":")
            try:
                require(bool(colon), "schedule", text, "ITERATION:RATIO pairs separated by commas")
                stops.append((int(iteration), float(ratio)))
            except ValueError as error:
                raise ValueError(
                    f"schedule: got {text!r}, allowed: ITERATION:RATIO pairs separated by commas, such as "
                    f"50:0.3,100:0.3 ({part!r} is none)"
                ) from error
        return cls(tuple(stops))

    def __str__(self) -> str:
        return ",".join(f"{iteration}:{ratio}" for iteration, ratio in self.stops)

    def scaled(self, share: float) -> StopSchedule:
        """The same ratios at `share` times their iterations, at least 1 and still apart."""
        moved: list[tuple[int, float]] = []
        for iteration, ratio in self.stops:
            earliest = moved[-1][0] + 1 if moved else 1
            moved.append((max(earliest, round(iteration * share)), ratio))
        return StopSchedule(tuple(moved))

    def kept_counts(self, patches: int) -> list[tuple[int, int]]:
        """(iteration, patches kept from there on), from (0, patches).

        A stop keeps max(1, floor(n (1 - ratio) + 1e-9)) of n patches. A stop at iteration 0
        takes the place of the first entry.
        """
        counts = {0: patches}
        for iteration, ratio in self.stops:
            patches = max(1, math.floor(patches * (1 - ratio) + 1e-9))
            counts[iteration] = patches
        return list(counts.items())
