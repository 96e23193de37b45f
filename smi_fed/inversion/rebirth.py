"""Patch rebirth inversion (PRI, arXiv 2509.23235): one trajectory yields several images.

At each stop the patches that matter most detach as a finished sparse image, and the others
go on until they matter. Deviations: pixels of the patches outside a finished image's mask
are those that the trajectory has at that moment, so that a student that is shown whole
images sees no holes; what the schedule calls the ratio is the share that detaches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smi_fed.inversion.choices import Rebirth
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.selections import best
from smi_fed.inversion.teacher import adapt


def last(scores: Tensor, count: int) -> Tensor:
    """Indices (b, count) of the lowest scores (b, k), ascending: those that go on."""
    return best(-scores, count)


def images_per_trajectory(config: InversionConfig, patches: int) -> int:
    """Finished images of one target: one for each stop that lets patches go, and the last; 1 without rebirth."""
    counts = {patches} | {count for _, count in config.schedule.kept_counts(patches)}
    return len(counts) if isinstance(config.stopping, Rebirth) else 1


def trajectories(model: nn.Module, config: InversionConfig, images: int) -> int:
    """How many targets give at least `images` finished images of `model`, at least 1 of each.

    Raises:
        ValueError: the model or its patch size cannot be, see `adapt`.
    """
    rows, columns = adapt(model, config.patch_size).grid
    return -(-images // images_per_trajectory(config, rows * columns))


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
