"""When patches stop, and how many."""

from __future__ import annotations

import math

from smi_fed.checks import Natural, SettingError, Share, checked, require


@checked
class StopSchedule:
    """At each listed iteration a share of the *remaining* patches stops for good.

    Args:
        stops: pairs (iteration >= 0, ratio inside (0, 1)), iterations strictly
            increasing. Empty is dense inversion.

    Raises:
        SettingError: naming the stop that cannot be.
    """

    stops: tuple[tuple[Natural, Share], ...] = ()

    def __post_init__(self) -> None:
        iterations = [iteration for iteration, _ in self.stops]
        good = iterations == sorted(set(iterations))
        require(good, "stops", self.stops, "strictly increasing iterations")

    @classmethod
    def parse(cls, text: str) -> StopSchedule:
        """Read '50:0.3,100:0.3'; an empty text is dense.

        Raises:
            SettingError: the text does not have this form, or its stops cannot be.
        """
        pairs = [part.partition(":") for part in text.split(",")] if text.strip() else []
        try:
            return cls(tuple((int(iteration), float(ratio)) for iteration, _, ratio in pairs))
        except SettingError as error:
            allowed = "iterations >= 0, strictly increasing, with ratios inside (0, 1)"
            raise SettingError("schedule", text, allowed) from error
        except ValueError as error:
            allowed = "ITERATION:RATIO pairs separated by commas, such as 50:0.3,100:0.3"
            raise SettingError("schedule", text, allowed) from error

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
