"""What a round waits for, and what a late reply still counts."""

from __future__ import annotations

import math

from smi_fed.checks import Count, Flag, NonNegative, checked, require


@checked
class WaitingConfig:
    """What a round waits for.

    Args:
        quorum: admitted models that are enough; the round ends `grace_seconds` after them. None waits for all nodes.
        grace_seconds: that are waited on for further replies once there is a quorum.
        asynchronous: no rounds: the student is refreshed every `quorum` admitted models, by those and by the
            newest model of every other client.
        staleness: how much less a late model is heard: its weight in the ensemble is (1 + age)^-staleness, its
            age in rounds; 0 is as much as a new one.

    Raises:
        SettingError: naming what cannot be.

    A reply that comes when its round is over joins the next round's teachers. Its node is
    asked again when it has answered, or failed to. The weight is FedAsync's (Xie et al.,
    2019, section 5, polynomial); there it mixes models, here it weighs what a teacher says.
    """

    quorum: Count | None = None
    grace_seconds: NonNegative = 0.0
    asynchronous: Flag = False
    staleness: NonNegative = 0.5

    def __post_init__(self) -> None:
        known = self.quorum is not None
        require(known or not self.grace_seconds, "grace_seconds", self.grace_seconds, "0 without quorum")
        require(known or not self.asynchronous, "asynchronous", self.asynchronous, "false without quorum")

    @property
    def grace(self) -> float:
        """Seconds after a quorum; without one every node is waited for."""
        return math.inf if self.quorum is None else self.grace_seconds

    def weight(self, age: int) -> float:
        """How much a model of that many rounds ago is heard, in (0, 1]."""
        return (1.0 + age) ** -self.staleness
