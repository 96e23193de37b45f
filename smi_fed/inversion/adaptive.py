"""A stop schedule that trusts a teacher's attention as far as it says something.

Some pretrained ViTs attend to artefacts or to everything. A few images are inverted densely
as a probe; at each planned stop two numbers tell how far the plan is followed:

- how peaked attention is: exp(entropy) is the number of patches that it is spread over, and
  never fewer go on;
- how stable it is: the overlap of the patches that would go on with those half-way since the
  stop before, less what chance gives (0 chance, 1 the same).

Attention that is flat, or that jumps, gives dense inversion.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smi_fed.checks import checked
from smi_fed.inversion.planning import PROBES, Plan, Probe
from smi_fed.inversion.schedule import StopSchedule

log = logging.getLogger("smi_fed")


@checked
class Adaptive:
    """The schedule, with ratios no higher than the teacher's attention bears."""

    kind: Literal["adaptive"] = field(default="adaptive", kw_only=True)
    summary: ClassVar[str] = "adaptive schedule"

    def plan(self, written: StopSchedule, patches: int, probe: Probe) -> Plan:
        """The probe's looks at attention, two forward passes for each stop, are not counted as spent."""
        stops = [pair for pair in written.kept_counts(patches) if pair[1] < patches]
        if not stops:
            return Plan(written)
        schedule = adapted(stops, read_attention(probe, stops), patches)
        log.info("stop schedule that this teacher's attention bears: '%s' of '%s'", schedule, written)
        return Plan(schedule, {patches: PROBES * written.stops[-1][0]})


@dataclass(frozen=True)
class Reading:
    """What attention says at a planned stop, mean over the probe.

    Attributes:
        spread: exp(entropy) over the number of patches, in (0, 1]; 1 is flat.
        stability: overlap above chance, in [0, 1].
    """

    spread: float
    stability: float


def adapted(stops: Sequence[tuple[int, int]], readings: Sequence[Reading], patches: int) -> StopSchedule:
    """The stops (iteration, patches kept), each as far as its reading bears."""
    softened, going = [], patches
    for (iteration, count), reading in zip(stops, readings, strict=True):
        share = 1 - reading.stability * (1 - max(count / patches, reading.spread))
        least = math.ceil(share * patches - 1e-9)
        if least < going:
            softened.append((iteration, 1 - least / going))
            going = least
    return StopSchedule(tuple(softened))


def read_attention(probe: Probe, stops: Sequence[tuple[int, int]]) -> list[Reading]:
    """One reading for each (iteration, patches that would go on), iterations rising."""
    before, ages = 0, []
    for iteration, _ in stops:
        ages += [(before + iteration) // 2, iteration]
        before = iteration
    looks = probe(ages)
    readings = [reading(looks[2 * i], looks[2 * i + 1], count) for i, (_, count) in enumerate(stops)]
    # Nothing moved before a stop at 0: two looks at the same noise say nothing.
    return [r if at else Reading(r.spread, 0.0) for r, (at, _) in zip(readings, stops, strict=True)]


def reading(earlier: Tensor, now: Tensor, count: int) -> Reading:
    """What two looks at the importance (b, n) of the same patches say, if `count` of them went on."""
    n = now.shape[1]
    shares = now.double().clamp(min=0) + 1e-12
    shares = shares / shares.sum(1, keepdim=True)
    spread = (-(shares * shares.log()).sum(1)).exp() / n
    top = [torch.zeros_like(each, dtype=torch.bool).scatter(1, each.topk(count).indices, value=True) for each in
           (earlier, now)]  # fmt: skip
    overlap = (top[0] & top[1]).sum(1).double() / count
    chance = count / n
    stability = (overlap - chance) / max(1 - chance, 1e-12)
    return Reading(float(spread.mean()), float(stability.mean().clamp(0, 1)))
