"""Patch rebirth inversion (PRI, arXiv 2509.23235): one trajectory yields several images.

At each stop the patches that matter most detach as a finished sparse image, and the others
go on until they matter. Deviations: pixels of the patches outside a finished image's mask
are those that the trajectory has at that moment, so that a student that is shown whole
images sees no holes; what the schedule calls the ratio is the share that detaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smi_fed.checks import checked
from smi_fed.inversion.selections import best
from smi_fed.inversion.state import State


@checked
class Rebirth:
    """At a stop the best patches detach as a finished image and the others go on (PRI).

    A target gives one image more than there are stops. It remembers of each target `images`
    (b, s, n, c, ph, pw), those that are finished.
    """

    kind: Literal["rebirth"] = field(default="rebirth", kw_only=True)
    summary: ClassVar[str] = "rebirth"

    def images(self, counts: Sequence[int]) -> int:
        return len(set(counts))

    def start(self, state: State) -> None:
        state.stopping = {"images": state.canvas[:, None][:, :0]}

    def going_on(self, scores: Tensor, count: int) -> Tensor:
        return best(-scores, count)

    def emit(self, state: State, shown: Tensor) -> None:
        state.stopping = {"images": torch.cat([state.stopping["images"], shown[:, None]], dim=1)}

    def finished(self, state: State, shown: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.cat([state.stopping["images"], shown[:, None]], dim=1)
        return images, stops_of_images(state.stopped_at, images.shape[1])


def stops_of_images(stopped_at: Tensor, images: int) -> Tensor:
    """When each patch stopped for each finished image of a trajectory.

    Args:
        stopped_at: (b, n) int64, when each patch detached; -1 for those that never did.
        images: finished images per trajectory.

    Returns:
        (b, images, n) int64: -1 for the patches that make up the image. Those that detached
        before keep their iteration; for those that went on it is the one at which the image
        was finished.
    """
    ages = stopped_at.unique(dim=None)
    finished = ages[ages >= 0][: images - 1].tolist()
    rows = []
    for age in finished:
        later = (stopped_at < 0) | (stopped_at > age)
        rows.append(stopped_at.where(~later, age).where(stopped_at != age, -1))
    return torch.stack([*rows, stopped_at], dim=1)
