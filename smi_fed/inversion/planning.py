"""Whose stop schedule it is, decided before an inversion begins; the paper's: the one that is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from smi_fed.checks import checked
from smi_fed.inversion.schedule import StopSchedule

PROBES = 8
"""Images of a probe."""

Probe = Callable[[Sequence[int]], list[Tensor]]
"""Ages, rising -> at each the teacher's importance (PROBES, n) of every patch of a few images, inverted densely."""


@dataclass(frozen=True)
class Plan:
    """A schedule, and what it took to find it: iterations of single images by the patches they kept."""

    schedule: StopSchedule
    spent: Mapping[int, int] = field(default_factory=dict)


class PlanningRule(Protocol):
    """One way to come to a schedule; a settings class of its own, with a `kind`."""

    @property
    def summary(self) -> str:
        """The rule in words; empty for the paper's."""
        ...

    def plan(self, written: StopSchedule, patches: int, probe: Probe) -> Plan:
        """The schedule of a teacher of that many patches.

        Args:
            written: that of the settings.
            patches: of the whole grid.
            probe: looks at the teacher; costs nothing unless it is called.
        """
        ...


@checked
class Fixed:
    """The schedule as it is written (the paper's)."""

    kind: Literal["fixed"] = field(default="fixed", kw_only=True)
    summary: ClassVar[str] = ""

    def plan(self, written: StopSchedule, patches: int, probe: Probe) -> Plan:
        return Plan(written)
