"""From worlds to what was found: each world in turn is under attack, and the others are the attacker's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from smi_fed.audit.lira import Leak, leak_of, likelihood_ratios
from smi_fed.audit.nearest import Nearness
from smi_fed.audit.worlds import CPU, HELD_BY, AuditConfig, Device, Recipe, World, marked, world
from smi_fed.data import ImageSet
from smi_fed.progress import Bar


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        examples: of whom it was asked whether they are members, by `model`, `student` and `images`.
        canaries: the same of canaries alone; empty without.
        ssim, features: of synthetic images to training images and to others; features are those of the model.
        accuracy: as a world has it, means over the worlds.
        worlds: how many there were.
    """

    examples: dict[str, Leak]
    canaries: dict[str, Leak]
    ssim: Nearness
    features: Nearness
    accuracy: dict[str, float]
    worlds: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def audited(
    recipe: Recipe, data: ImageSet, test: ImageSet, config: AuditConfig, seed: int = 0, device: Device = CPU
) -> Audit:
    """Make every world, and attack each with the others.

    Args:
        data: labelled images, of which each world has half; in memory.
        test: for accuracies.
    """
    worlds = list[World]()
    with Bar("audit", config.worlds, unit="world") as bar:
        for number in range(config.worlds):
            worlds.append(world(recipe, data, test, config, seed, number, device))
            bar.at(number + 1)
    return judged(worlds, marked(data, config, seed)[1])


def judged(worlds: Sequence[World], canary: Tensor) -> Audit:
    """What all worlds of an audit tell together.

    Args:
        canary: (n,) bool, which examples are canaries.
    """
    inside = torch.stack([each.members for each in worlds])
    ratios = {held: _ratios(torch.stack([each.seen[held] for each in worlds]), inside) for held in HELD_BY}

    def leaks(chosen: Tensor) -> dict[str, Leak]:
        found = inside[:, chosen].flatten()
        return {held: leak_of(scores[:, chosen].flatten(), found) for held, scores in ratios.items()}

    accuracy = {name: sum(each.accuracy[name] for each in worlds) / len(worlds) for name in worlds[0].accuracy}
    near = {kind: _mean([each.near[kind] for each in worlds]) for kind in worlds[0].near}
    canaries = leaks(canary) if canary.any() else {}
    return Audit(leaks(~canary), canaries, near["ssim"], near["features"], accuracy, len(worlds))


def _ratios(seen: Tensor, inside: Tensor) -> Tensor:
    """(worlds, n): each world attacked by all the others."""
    rows = torch.arange(len(seen))
    return torch.stack([
        likelihood_ratios(seen[world], seen[rows != world], inside[rows != world]) for world in range(len(seen))
    ])  # fmt: skip


def _mean(found: Sequence[Nearness]) -> Nearness:
    return Nearness(*(sum(getattr(each, key) for each in found) / len(found)
                      for key in ("nearer", "training", "held_out")))  # fmt: skip
