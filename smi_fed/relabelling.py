"""Token relabelling: every patch token of the student learns a label of its own.

After FedMITR (arXiv 2605.10748), which has no public code, and token labelling (Jiang et
al., 2021). A token over patches that inversion kept learns what its image was made to show;
the others are relabelled by the ensemble. Of what FedMITR's abstract leaves open, this file
chose: tokens add to the image-level loss, which stays the ensemble's; the student's own head
reads each token; a student's patch may lie under kept and stopped ones, and its label is a
mixture by area; mixed images mix their labels; both labels are compared at the
distillation's temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed import tokens
from smi_fed.alignment import kept_pixels
from smi_fed.lazy import one_by_one
from smi_fed.models import Classifier, unwrapped
from smi_fed.sparse_images import SparseImages


class Relabelling:
    """Logits and labels of a student's patch tokens.

    Args:
        student: a `Classifier` of a token model, or such a timm ViT itself.
        sets: all images; targets (b,) in the student's classes.
        patch_size: height and width in pixels of the student's patches.
        size: height and width in pixels at which it is shown the images.
        device: of what `target_labels` gives.

    Raises:
        ValueError: a student without one token for each patch, multi-label targets, or
            targets that are not among the student's classes.
    """

    def __init__(
        self,
        student: nn.Module,
        sets: Sequence[SparseImages],
        patch_size: tuple[int, int],
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.student, self.patch_size, self.size = student, patch_size, size
        self.masks = one_by_one(sets, lambda each: (each.mask.to(device), each.patch_size))
        self.targets = torch.cat(one_by_one(sets, _single_labels)).to(device)
        self.classes = _vit(student).num_classes
        if bool(((self.targets < 0) | (self.targets >= self.classes)).any()):
            raise ValueError(
                f"relabel: got targets from {int(self.targets.min())} to {int(self.targets.max())}, "
                f"allowed: the student's classes, 0 to {self.classes - 1}"
            )

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of images (b, c, h, w) the student's logits (b, classes) and those of its patch tokens (b, n, classes)."""
        found: list[Tensor] = []

        def collect(_module: nn.Module, _args: Any, output: Tensor) -> None:
            found.append(output)

        handle = _vit(self.student).norm.register_forward_hook(collect)
        try:
            logits = self.student(images)
        finally:
            handle.remove()
        return logits, token_logits(self.student, found[-1])

    def target_labels(self, rows: Tensor, shift: Tensor | None = None) -> Tensor:
        """Labels (b, n, classes) of the tokens of images `rows` (b,), each summing to its kept share.

        It is linear: those of mixed images are mixed like the images.

        Args:
            rows: places of the images in all sets.
            shift: (b, 2) pixels that each image is shifted by; None for none.
        """
        rows = rows.to(self.targets.device)
        pixels, begin = self.targets.new_zeros(len(rows), 1, *self.size, dtype=torch.float32), 0
        for mask, patch_size in self.masks:
            here = (rows >= begin) & (rows < begin + len(mask))
            pixels[here] = kept_pixels(mask[rows[here] - begin], patch_size, self.size)
            begin += len(mask)
        shown = pixels if shift is None else tokens.roll_images(pixels, shift.to(rows.device))
        kept = F.avg_pool2d(shown, self.patch_size).flatten(1).clamp(0, 1)  # shares of a third are not exact
        return of_targets(self.targets[rows], kept, self.classes)


def of_targets(targets: Tensor, kept: Tensor, classes: int) -> Tensor:
    """Labels (b, n, classes): those of `targets` (b,), as far as a token lies under kept patches, `kept` (b, n)."""
    return kept[:, :, None] * F.one_hot(targets, classes).to(kept)[:, None]


def relabelled(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Token labels (b, n, classes), each summing to 1: `labels`, and `probabilities` (b, classes) for the rest."""
    return labels + (1 - labels.sum(-1, keepdim=True)) * probabilities[:, None]


def token_logits(student: nn.Module, features: Tensor) -> Tensor:
    """Logits (b, n, classes) that the student's own head gives each patch token of `features` (b, prefix + n, d).

    Each token is shown to the head in the place of all: pooling, of whatever kind, finds that token.
    """
    vit = _vit(student)
    b, _, d = features.shape
    patches = features[:, vit.num_prefix_tokens :]
    alone = patches.reshape(-1, 1, d).expand(-1, vit.num_prefix_tokens + 1, -1)
    return vit.forward_head(alone).view(b, patches.shape[1], -1)


def require_patch_tokens(student: nn.Module, weight: float) -> tuple[int, int]:
    """The student's patch size; ValueError, naming the weight, unless it has one token for each patch of its images."""
    vit = _vit(student)
    if not tokens.is_token_model(vit) or not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError(f"relabel: got {weight} for a student without one token for each patch, allowed: 0")
    return vit.patch_embed.patch_size


def _vit(student: nn.Module) -> Any:
    inner = unwrapped(student)
    return inner.backbone if isinstance(inner, Classifier) else inner


def _single_labels(images: SparseImages) -> Tensor:
    if images.targets.ndim != 1:
        raise ValueError(
            f"relabel: got multi-label targets {tuple(images.targets.shape)}, allowed: one class per image, or 0"
        )
    return images.targets
