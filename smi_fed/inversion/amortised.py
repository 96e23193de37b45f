"""Amortised inversion: few images are inverted in full, and the others begin where those ended.

The idea is that of Fast-Datafree (Fang et al., AAAI 2022), which meta-learns what images of CNNs begin from. Here is no
generator: an image begins at a mixture of finished images of its class, or at one start of its
class that is learned as the others are made (Reptile, Nichol et al., 2018), and takes few
iterations, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.checks import Count, Natural, NonNegative, Positive, Share, checked, require
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.engine import invert
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.sparse_images import SparseImages

GRID = 8
"""Side length of the noise on a learned start: of low frequency, as images are."""


@checked
class Amortised:
    """How the other images begin, and how long they take.

    Args:
        start: mixtures | learned.
        pioneers: share of the targets that is inverted in full, in (0, 1); one of each class at least.
        iterations: of the others; with 0 they stay what they begin as.
        parts: finished images in a mixture, with weights that are drawn evenly from all that sum to 1.
        shift: largest cyclic shift of a mixture per axis in pixels.
        rate: how far a class's start goes, after each batch, to the mean of those that began there, in (0, 1]. With
            `batch_size=auto` there is one batch, and a learned start is the mean of the pioneers.
        noise: standard deviation on a learned start, in pixels of [0, 1].
    """

    start: Literal["mixtures", "learned"] = "mixtures"
    pioneers: Share = 0.25
    iterations: Natural = 2
    parts: Count = 2
    shift: Natural = 2
    rate: Positive = 0.5
    noise: NonNegative = 0.1

    def __post_init__(self) -> None:
        require(self.rate <= 1, "rate", self.rate, "a number in (0, 1]")


def invert_amortised(
    model: nn.Module, targets: Tensor, config: InversionConfig, how: Amortised, *, generator: torch.Generator,
    statistics: FeatureStatistics | None = None, teacher_id: int = 0,
) -> SparseImages:  # fmt: skip
    """Synthesise images of `model`, most of them from what the first ones became.

    Args:
        model, statistics, teacher_id: as in `invert`.
        targets: (b,) integer class indices.
        config: of the pioneers; the others have its stops in proportion, or none where they are too few for that.
        generator: draws for pioneers, starts and the others.

    Returns:
        As `invert`, in order of their ids, with rebirth too.

    Raises:
        ValueError: targets of several classes at once, or what `invert` refuses.
    """
    require(targets.ndim == 1, "targets", tuple(targets.shape), "(b,), one class each")
    known = {"generator": generator, "statistics": statistics, "teacher_id": teacher_id}
    first, rest = divided(targets.cpu(), how.pioneers)
    found = [invert(model, targets[first], config, **known)]
    found[0] = replace(found[0], ids=first[found[0].ids])
    for rows, warm in _starts(found, targets.cpu(), rest, how, config, generator):
        made = (
            invert(model, targets[rows], shortened(config, how.iterations), warm=warm, **known)
            if how.iterations
            else warm
        )
        found.append(replace(made, ids=rows[made.ids], teachers=torch.full_like(made.teachers, teacher_id)))
    together = SparseImages.concat(found)
    return together.select(together.ids.argsort(stable=True))


def divided(targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Places of the pioneers, the first of each class and then the first of all, and of the others; both ascending."""
    firsts = {label: place for place, label in reversed(list(enumerate(targets.tolist())))}
    order = list(dict.fromkeys([*firsts.values(), *range(len(targets))]))
    count = max(len(firsts), round(len(targets) * share))
    pioneers, others = (torch.tensor(sorted(part), dtype=torch.long) for part in (order[:count], order[count:]))
    return pioneers, others


def shortened(config: InversionConfig, iterations: int) -> InversionConfig:
    """The same in fewer iterations, without a stop where those would fall together."""
    if iterations <= len(config.schedule.stops):
        config = replace(config, schedule=StopSchedule())
    return config.scaled(iterations)


def _starts(
    found: list[SparseImages], targets: Tensor, rest: Tensor, how: Amortised, config: InversionConfig,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, SparseImages]]:  # fmt: skip
    """Places in `targets` and starts, part after part; what was made of a part is last in `found` when the next comes.

    A learned start goes on with each part; mixtures are all there at once.
    """
    grid = found[0].grid
    if how.start == "mixtures":
        if len(rest):
            yield rest, as_images(mixtures(found[0], targets[rest], how, generator), targets[rest], grid)
        return
    learned = class_means(found[0], int(targets.max()) + 1)
    for rows in rest.split(len(rest) if config.batch_size == "auto" else config.batch_size) if len(rest) else ():
        low = torch.randn(len(rows), learned.shape[1], GRID, GRID, generator=generator)
        noise = F.interpolate(low, learned.shape[2:], mode="bilinear", align_corners=False)
        pixels = (learned[targets[rows]] + how.noise * noise).clamp(0, 1)
        yield rows, as_images(pixels, targets[rows], grid)
        means, seen = class_means(found[-1], len(learned)), found[-1].targets.unique()
        learned[seen] += how.rate * (means[seen] - learned[seen])


def mixtures(finished: SparseImages, targets: Tensor, how: Amortised, generator: torch.Generator) -> Tensor:
    """For each of `targets` (b,) a convex mixture (b, c, h, w) of finished images of its class, shifted."""
    images, pixels = finished.images, []
    of_class = {label: (finished.targets == label).nonzero()[:, 0] for label in targets.unique().tolist()}
    for label in targets.tolist():
        own = of_class[label]
        parts = own[torch.randint(len(own), (how.parts,), generator=generator)]
        weights = -torch.rand(how.parts, generator=generator).clamp(min=1e-12).log()  # Dirichlet(1), once they sum to 1
        mixed = (images[parts] * (weights / weights.sum()).view(-1, 1, 1, 1)).sum(0)
        down, right = torch.randint(-how.shift, how.shift + 1, (2,), generator=generator).tolist()
        pixels.append(mixed.roll((down, right), (1, 2)).clamp(0, 1))
    return torch.stack(pixels)


def class_means(images: SparseImages, classes: int) -> Tensor:
    """Mean image (classes, c, h, w) of each class; 0 where it has none."""
    counts = torch.bincount(images.targets, minlength=classes).clamp(min=1).view(-1, 1, 1, 1)
    sums = torch.zeros(classes, *images.images.shape[1:]).index_add(0, images.targets, images.images)
    return sums / counts


def as_images(pixels: Tensor, targets: Tensor, grid: tuple[int, int], teacher_id: int = 0) -> SparseImages:
    """Images (b, c, h, w) in [0, 1] that no inversion made, or that one may begin from, on a grid of patches."""
    whole = torch.ones(len(pixels), *grid, dtype=torch.bool)
    size = (pixels.shape[2] // grid[0], pixels.shape[3] // grid[1])
    return SparseImages(
        pixels, whole, targets, size, torch.arange(len(pixels)), torch.full_like(targets, teacher_id),
        torch.where(whole, -1, 0),
    )  # fmt: skip
