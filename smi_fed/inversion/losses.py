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
    """Per layer and position, mean and standard deviation of a model's token features.

    Attributes:
        mean, std: one (prefix + n, d) float32 tensor per layer: the tokens that enter the
            first block, then those that leave each block.
        examples: how many images they were computed from.

    With one image the mean is that image's features: a client must not send these for few
    examples (`minimum_examples` in the client's settings). For many examples too they tell
    more of the data than the weights do: the first layer is linear in the pixels, so the
    client's mean image can be read from it.
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
            _, layers = teacher.features(View(patches, positions))
            layers = [layer.double() for layer in layers]
            if not sums:
                sums, squares = ([torch.zeros_like(layer[0]) for layer in layers] for _ in range(2))
            for i, layer in enumerate(layers):
                sums[i] += layer.sum(0)
                squares[i] += layer.square().sum(0)
            count += len(images)
    if not count:
        raise ValueError("feature statistics need at least one image, got none")
    means = [total / count for total in sums]
    deviations = [(square / count - m.square()).clamp(min=0).sqrt() for square, m in zip(squares, means, strict=True)]
    return FeatureStatistics(tuple(m.float() for m in means), tuple(s.float() for s in deviations), count)


def statistics_prior(layers: list[Tensor], positions: Tensor, teacher: Teacher, known: FeatureStatistics) -> Tensor:
    """Distance (scalar) of the batch's token statistics from the known ones.

    Per layer and position, over the images of the batch that keep it: squared differences of
    mean and of standard deviation, in units of the layer's mean variance, averaged over
    features and tokens. What BatchNorm statistics are to DeepInversion (Yin et al., 2020).

    The batch's composition is part of the result: an image inverted in another batch is
    another image.

    Args:
        layers: the tokens (b, prefix + k, d) of each layer.
        positions: (b, k) int64.
    """
    prefix = torch.arange(teacher.prefix_tokens, device=positions.device).expand(len(positions), -1)
    rows = torch.cat([prefix, positions + teacher.prefix_tokens], dim=1).flatten()
    ones = torch.ones_like(rows, dtype=layers[0].dtype)
    counts = ones.new_zeros(len(known.mean[0])).index_add(0, rows, ones)[:, None]
    total = layers[0].new_zeros(())
    for layer, mean, std in zip(layers, known.mean, known.std, strict=True):
        flat = layer.flatten(0, 1)
        sums = torch.zeros_like(mean).index_add(0, rows, flat)
        squares = torch.zeros_like(mean).index_add(0, rows, flat.square())
        own_mean = sums / counts.clamp(min=1)
        own_variance = squares / counts.clamp(min=1) - own_mean.square()
        # A root has no slope at 0, and one image has no deviation to compare.
        own_std = own_variance.clamp(min=1e-8).sqrt()
        difference = (own_mean - mean).square() + (own_std - std).square() * (counts > 1)
        total = total + (difference * counts).mean(1).sum() / counts.sum() / std.square().mean()
    return total / len(layers)


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
            f"feature statistics: got {len(known.mean)} layers of shape {shapes[:1]}, expected finite ones for "
            f"{tokens} tokens with deviations >= 0"
        )
