"""The student's side of a step: which tokens it is shown, and its loss on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed import tokens
from smi_fed.alignment import kept_pixels
from smi_fed.distillation.config import DistillationConfig
from smi_fed.distillation.views import Draw, blend
from smi_fed.lazy import one_by_one
from smi_fed.models import Classifier, logits_of, unwrapped
from smi_fed.relabelling import Relabelling, relabelled, require_patch_tokens
from smi_fed.sparse_images import SparseImages


def distillation_loss(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """T^2 KL(probabilities || softmax(logits / T)), mean over the batch (scalar)."""
    return temperature**2 * F.kl_div((logits / temperature).log_softmax(-1), probabilities, reduction="batchmean")


class Shown:
    """The student's view: all tokens, or those over the patches that inversion kept; and its loss on them."""

    def __init__(
        self,
        student: nn.Module,
        sets: Sequence[SparseImages],
        config: DistillationConfig,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.student, self.config, self.mode = student, config, config.tokens
        self.relabelling = None
        if config.relabel:
            patch_size = require_patch_tokens(student, config.relabel)
            self.relabelling = Relabelling(student, sets, patch_size, size, device)
        if self.mode == "all":
            return
        inner = unwrapped(student)
        if not isinstance(inner, Classifier) or not tokens.is_token_model(inner.backbone):
            raise ValueError(f"tokens: got {self.mode!r} for a student without patch tokens, allowed: all")
        self.inner = inner
        self.patch_size: tuple[int, int] = inner.backbone.patch_embed.patch_size  # type: ignore[union-attr, assignment]
        self.kept = shown_tokens(sets, self.patch_size, inner.image_size).to(device)

    def loss(self, batch: Tensor, drawn: Draw, probabilities: Tensor) -> Tensor:
        """Of `batch`, what `drawn` shows, against the ensemble's `probabilities` (b, classes)."""
        temperature = self.config.temperature
        if self.relabelling is None:
            return distillation_loss(self.logits(batch, drawn), probabilities, temperature)
        logits, of_tokens = self.relabelling.logits(batch)
        labels = relabelled(
            blend(self.relabelling.target_labels(drawn.rows, drawn.shift), drawn.partners), probabilities
        )
        each = distillation_loss(of_tokens.flatten(0, 1), labels.flatten(0, 1), temperature)
        return distillation_loss(logits, probabilities, temperature) + self.config.relabel * each

    def logits(self, batch: Tensor, drawn: Draw) -> Tensor:
        """Of the tokens that `drawn` shows (b, classes)."""
        if drawn.everything:
            return logits_of(self.student(batch))
        patches = tokens.to_patches(self.inner.normalised(batch), self.patch_size)
        kept = self.kept[drawn.rows.to(batch.device)]
        return tokens.forward_patches(self.inner.backbone, tokens.take(patches, kept), kept)  # type: ignore[arg-type]


def shown_tokens(
    sets: Sequence[SparseImages], patch_size: tuple[int, int], size: tuple[int, int] | None = None
) -> Tensor:
    """Ascending indices (images, k) of the patches that lie most under kept ones.

    One k for all, so that they share a batch: the mean number kept, rounded up.
    """
    cover = torch.cat(one_by_one(sets, lambda each: coverage(each, patch_size, size)))
    count = math.ceil(float(cover.sum(dtype=torch.float64)) / len(cover) - 1e-4)  # shares of a third are not exact
    return cover.topk(max(1, count), dim=1).indices.sort(dim=1).values


def coverage(images: SparseImages, patch_size: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Share (b, n) of each patch of another grid that lies under kept patches, with the images shown at `size`."""
    return F.avg_pool2d(kept_pixels(images.mask, images.patch_size, size), patch_size).flatten(1)
