"""What an image is optimised for. Losses are per image unless they say otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.inversion.teacher import Teacher, View, adapt, frozen
from smi_fed.tokens import take, to_patches


def classification(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (b,) for class indices (b,), binary cross-entropy for (b, classes) labels."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none").mean(1)


@dataclass(frozen=True)
class Neighbours:
    """Which kept patches touch: index (b, k) of the neighbour among the kept, and whether it is there."""

    right: Tensor
    has_right: Tensor
    below: Tensor
    has_below: Tensor


def neighbours(kept: Tensor, grid: tuple[int, int]) -> Neighbours:
    """Neighbours among the patches `kept` (b, k) on a grid of (rows, columns)."""
    gh, gw = grid
    places = torch.full((len(kept), gh * gw + gw), -1, dtype=torch.long, device=kept.device)
    order = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    places.scatter_(1, kept, order)
    right = places.gather(1, kept + 1).where(kept % gw != gw - 1, torch.full((), -1, device=kept.device))
    below = places.gather(1, kept + gw)
    return Neighbours(right.clamp(min=0), right >= 0, below.clamp(min=0), below >= 0)


def total_variation(patches: Tensor, touching: Neighbours) -> Tensor:
    """Total variation (b,) of the kept region, l2 form.

    Per image the norm of horizontal differences plus the norm of vertical ones, over pairs
    of pixels that both belong to kept patches, so a stopped patch neither moves nor costs.
    The paper's public code takes norms over the whole batch and adds both diagonals; here
    an image's result does not depend on its batch.

    Args:
        patches: (b, k, c, ph, pw).
    """
    across = take(patches[..., :, 0], touching.right) - patches[..., :, -1]
    down = take(patches[..., 0, :], touching.below) - patches[..., -1, :]
    horizontal = patches.diff(dim=-1).square().sum((1, 2, 3, 4))
    horizontal = horizontal + (across.square().sum((2, 3)) * touching.has_right).sum(1)
    vertical = patches.diff(dim=-2).square().sum((1, 2, 3, 4))
    vertical = vertical + (down.square().sum((2, 3)) * touching.has_below).sum(1)
    # A flat image has no direction to descend; the square root's slope there would be NaN.
    tiny = torch.finfo(patches.dtype).tiny
    return horizontal.clamp(min=tiny).sqrt() + vertical.clamp(min=tiny).sqrt()


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Per block and position, mean and standard deviation of a model's token features.

    Attributes:
        mean, std: one (prefix + n, d) float32 tensor per block.
        examples: how many images they were computed from.

    With one image the mean is that image's features: a client must not send these for few
    examples (`minimum_examples` in the client's settings), and even for many they tell more
    of the data than the weights do.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    examples: int

    def to(self, reference: Tensor) -> FeatureStatistics:
        """On the device and in the dtype of `reference`."""
        mean = tuple(m.to(reference) for m in self.mean)
        return FeatureStatistics(mean, tuple(s.to(reference) for s in self.std), self.examples)


@torch.no_grad()
def feature_statistics(model: nn.Module, batches: Iterable[Tensor]) -> FeatureStatistics:
    """Statistics of a token model over batches of images (b, c, h, w) in [0, 1].

    Raises:
        ValueError: the model has no patch tokens, or there is no image.
    """
    teacher = adapt(model)
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    count = 0
    with frozen(model):
        for images in batches:
            patches = to_patches((images.to(teacher.mean) - teacher.mean) / teacher.std, teacher.patch_size)
            positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
            _, blocks = teacher.features(View(patches, positions))
            blocks = [block.double() for block in blocks]
            if not sums:
                sums, squares = ([torch.zeros_like(block[0]) for block in blocks] for _ in range(2))
            for i, block in enumerate(blocks):
                sums[i] += block.sum(0)
                squares[i] += block.square().sum(0)
            count += len(images)
    if not count:
        raise ValueError("feature statistics need at least one image, got none")
    means = [total / count for total in sums]
    deviations = [(square / count - m.square()).clamp(min=0).sqrt() for square, m in zip(squares, means, strict=True)]
    return FeatureStatistics(tuple(m.float() for m in means), tuple(s.float() for s in deviations), count)


def statistics_prior(blocks: list[Tensor], positions: Tensor, teacher: Teacher, known: FeatureStatistics) -> Tensor:
    """Distance (scalar) of the batch's token statistics from the known ones.

    Features are whitened by the known mean and deviation of their own position; what is
    left should have mean 0 and deviation 1. While all patches are kept this is asked of
    each position, later of each feature pooled over the kept positions, since few images
    of a batch share one.

    The batch's composition is part of the result: an image inverted in another batch is
    another image.

    Args:
        blocks: per block the tokens (b, prefix + k, d).
        positions: (b, k) int64.
    """
    b, k = positions.shape
    prefix = torch.arange(teacher.prefix_tokens, device=positions.device).expand(b, -1)
    rows = torch.cat([prefix, positions + teacher.prefix_tokens], dim=1)
    dense = k == teacher.grid[0] * teacher.grid[1]
    total = blocks[0].new_zeros(())
    for block, mean, std in zip(blocks, known.mean, known.std, strict=True):
        floor = 0.1 * std.mean()  # a constant feature must not be divided by its zero deviation
        white = (block - mean[rows]) / std.clamp(min=floor)[rows]
        if dense:
            total = total + white.mean(0).square().mean() + (white.std(0, correction=0) - 1).square().mean()
        else:
            total = total + white.mean((0, 1)).square().mean()
    return total / len(blocks)


def check_statistics(teacher: Teacher, known: FeatureStatistics) -> None:
    """Refuse statistics that are not of this teacher.

    Raises:
        ValueError: naming what was got and what is expected.
    """
    tokens = teacher.prefix_tokens + teacher.grid[0] * teacher.grid[1]
    shapes = [tuple(t.shape) for t in (*known.mean, *known.std)]
    same = all(a == b for a, b in pairwise(shapes)) and len(known.mean) == len(known.std)
    finite = all(bool(t.isfinite().all()) for t in (*known.mean, *known.std))
    if not shapes or not same or not finite or shapes[0][0] != tokens or any(bool((s < 0).any()) for s in known.std):
        raise ValueError(
            f"feature statistics: got {len(known.mean)} blocks of shape {shapes[:1]}, expected finite ones for "
            f"{tokens} tokens with deviations >= 0"
        )
