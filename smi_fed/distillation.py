"""A student taught by several teachers on synthetic images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed import tokens
from smi_fed.alignment import resize
from smi_fed.checks import Count, NonNegative, Positive, Text, checked, one_of, require, require_choice
from smi_fed.models import Classifier
from smi_fed.relabelling import Relabelling, relabelled, require_patch_tokens
from smi_fed.sparse_images import SparseImages
from smi_fed.training import Optimiser, TrainingConfig, evaluating, shift_images

ENSEMBLES = ("uniform", "examples", "class")


@checked
class DistillationConfig(TrainingConfig):
    """Settings of `distill`; those of `TrainingConfig` are the student's optimiser.

    Args:
        temperature: of both softmaxes, above 0.
        mixup: Beta parameter of mixing pairs of synthetic images; 0 is off.
        tokens: which tokens the student is shown: all | kept | mixed (either, by batch).
        ensemble: how teachers are weighted: uniform | examples | class.
        relabel: weight of the patch tokens' own labels (`smi_fed.relabelling`), >= 0; 0 is off, else
            the student has to be shown all tokens.

    Raises:
        SettingError: naming what cannot be.
    """

    steps: Count = 600
    temperature: Positive = 2.0
    mixup: NonNegative = 1.0
    tokens: Literal["all", "kept", "mixed"] = "all"
    ensemble: Annotated[Text, one_of(ENSEMBLES)] = "class"
    relabel: NonNegative = 0.0

    def __post_init__(self) -> None:
        require(not self.relabel or self.tokens == "all", "relabel", self.relabel, "0 unless tokens is all")


@dataclass
class DistillationRecord:
    """What a distillation did: steps, seconds, and the loss after each step."""

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def ensemble_weights(kind: str, num_examples: Sequence[int], label_counts: Sequence[Sequence[float] | None]) -> Tensor:
    """Weight of each teacher for each class.

    Args:
        kind: uniform | examples (by the client's examples) | class (by its examples of that class).
        num_examples: per teacher.
        label_counts: per teacher, examples of each class; needed for `class`.

    Returns:
        (teachers, classes) or (teachers, 1) float32; every column sums to 1. A class that
        nobody has seen is weighted evenly.

    Raises:
        ValueError: an unknown kind, negative counts, or `class` without every teacher's counts.
    """
    require_choice("ensemble", kind, ENSEMBLES)
    if kind == "class":
        if any(counts is None for counts in label_counts):
            raise ValueError(
                "ensemble: got 'class' but not every client sent label counts, allowed: uniform | examples"
            )
        weights = torch.tensor([list(counts or ()) for counts in label_counts], dtype=torch.float32)
    else:
        values = [1.0] * len(num_examples) if kind == "uniform" else [float(n) for n in num_examples]
        weights = torch.tensor(values)[:, None]
    if bool((weights < 0).any()):
        raise ValueError("ensemble: got negative counts, allowed: counts >= 0")
    total = weights.sum(0)
    return torch.where(total > 0, weights / total.clamp(min=1e-12), 1 / len(weights))


def ensemble_probabilities(logits: Sequence[Tensor], weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Weighted mean (b, classes) of the teachers' softened probabilities, normalised again.

    With weights per class this is FedDF's average logits' cousin for skewed clients: a
    teacher is heard on a class as far as it has seen it.
    """
    softened = torch.stack([(each / temperature).log_softmax(-1) for each in logits])
    return (softened + weights[:, None].to(softened).log()).logsumexp(0).softmax(-1)


def distill(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    images: SparseImages | Sequence[SparseImages],
    config: DistillationConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
    shares: Tensor | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> DistillationRecord:
    """Teach `student`, in place and on its own device, what the teachers say of the images.

    Minimises T^2 KL(ensemble || student) at temperature T (Hinton et al., 2015) over
    shifted and mixed synthetic images, and `config.relabel` times the same for each patch
    token and its label. The student is left in evaluation mode; teachers are left as they were.

    Args:
        teachers: modules that take images in [0, 1]; a `Classifier` is shown them at its own size.
        images: one set or several (of different patch and image size; they are shown at the student's);
            for relabelling their targets are the student's classes.
        generator: source of every random choice; a fresh seed of 0 when None.
        weights: (teachers, classes) or (teachers, 1), from `ensemble_weights`; None is uniform,
            whatever `config.ensemble` says: only the caller knows what clients told of their data.
        shares: (images,) how often each image is drawn, not normalised; None is evenly.
        progress: called with (steps done, loss tensor) after every step.

    Raises:
        ValueError: no teachers, no images, or `tokens` other than all for a student without tokens; for
            relabelling what `smi_fed.relabelling.Relabelling` refuses.
    """
    config = config or DistillationConfig()
    generator = generator or torch.Generator().manual_seed(0)
    sets = [images] if isinstance(images, SparseImages) else list(images)
    if not teachers or not sum(map(len, sets)):
        raise ValueError(f"distill: got {len(teachers)} teachers and {sum(map(len, sets))} images, need both")
    device = next(student.parameters()).device
    weights = (torch.full((len(teachers), 1), 1 / len(teachers)) if weights is None else weights).to(device)
    height, width = student.image_size if isinstance(student, Classifier) else sets[0].images.shape[2:]
    pixels = torch.cat([resize(each.images, (height, width)) for each in sets]).to(device)
    shown = _Shown(student, sets, config, (height, width), device)
    optimiser = Optimiser(student, config)
    started, losses = time.perf_counter(), []
    student.train()
    try:
        with evaluating(*teachers):
            for step in range(config.steps):
                rows = _draw(len(pixels), shares, config.batch_size, generator).to(device)
                batch = shift_images(pixels[rows], config.jitter, generator)
                partners = draw_partners(len(batch), config.mixup, generator)
                batch = blend(batch, partners)
                with torch.no_grad():
                    wanted = ensemble_probabilities([_answer(t, batch) for t in teachers], weights, config.temperature)
                loss = shown.loss(batch, rows, partners, wanted, generator)
                optimiser.step(loss)
                losses.append(loss.detach())
                if progress is not None:
                    progress(step + 1, losses[-1])
    finally:
        student.eval()
    return DistillationRecord(config.steps, time.perf_counter() - started, torch.stack(losses).tolist())


def _draw(images: int, shares: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    if shares is None:
        return torch.randint(images, (count,), generator=generator)
    return torch.multinomial(shares, count, replacement=True, generator=generator)


def _answer(teacher: nn.Module, images: Tensor) -> Tensor:
    """Logits of images of the student's size."""
    return teacher(resize(images, teacher.image_size) if isinstance(teacher, Classifier) else images)


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(wanted || softmax(logits / T)), mean over the batch (scalar)."""
    return temperature**2 * F.kl_div((logits / temperature).log_softmax(-1), wanted, reduction="batchmean")


Partners = tuple[Tensor, Tensor]
"""For each image of a batch its own share (b,) in [1/2, 1] and who has the rest (b,)."""


def draw_partners(count: int, alpha: float, generator: torch.Generator) -> Partners | None:
    """Whom each of `count` images is mixed with; None, without a draw, where `alpha` is 0."""
    if not alpha:
        return None
    # Beta(a, a) from two gamma draws, which take a generator; only a = 1 is uniform.
    if alpha == 1:
        share = torch.rand(count, generator=generator)
    else:
        gammas = torch._standard_gamma(torch.full((2, count), float(alpha)), generator=generator)
        share = gammas[0] / gammas.sum(0)
    return torch.maximum(share, 1 - share), torch.randperm(count, generator=generator)


def blend(values: Tensor, partners: Partners | None) -> Tensor:
    """Each row of `values` (b, ...) mixed with its partner's; as they are for None."""
    if partners is None:
        return values
    share = partners[0].to(values).view(-1, *[1] * (values.ndim - 1))
    return share * values + (1 - share) * values[partners[1].to(values.device)]


def mix(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Each image (b, c, h, w) mixed with another of the batch (Zhang et al., 2018); the larger share stays its own."""
    return blend(images, draw_partners(len(images), alpha, generator))


class _Shown:
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
        self.relabelling = _relabelling(student, sets, config.relabel, size, device) if config.relabel else None
        if self.mode == "all":
            return
        backbone = student.backbone if isinstance(student, Classifier) else None
        if not isinstance(student, Classifier) or backbone is None or not tokens.is_token_model(backbone):
            raise ValueError(f"tokens: got {self.mode!r} for a student without patch tokens, allowed: all")
        self.patch_size: tuple[int, int] = backbone.patch_embed.patch_size  # type: ignore[union-attr, assignment]
        self.kept = shown_tokens(sets, self.patch_size, student.image_size).to(device)

    def loss(
        self, batch: Tensor, rows: Tensor, partners: Partners | None, wanted: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Of `batch`, images `rows` mixed with `partners`, against the ensemble's `wanted` (b, classes)."""
        temperature = self.config.temperature
        if self.relabelling is None:
            return distillation_loss(self.logits(batch, rows, generator), wanted, temperature)
        logits, of_tokens = self.relabelling.logits(batch)
        labels = relabelled(blend(self.relabelling.told(rows), partners), wanted)
        each = distillation_loss(of_tokens.flatten(0, 1), labels.flatten(0, 1), temperature)
        return distillation_loss(logits, wanted, temperature) + self.config.relabel * each

    def logits(self, batch: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        everything = self.mode == "all"
        if self.mode == "mixed":
            everything = bool(torch.rand((), generator=generator) < 0.5)
        if everything:
            return self.student(batch)
        student = self.student
        assert isinstance(student, Classifier)
        patches = tokens.to_patches((batch - student.mean) / student.std, self.patch_size)
        kept = self.kept[rows]
        return tokens.forward_patches(student.backbone, tokens.take(patches, kept), kept)  # type: ignore[arg-type]


def _relabelling(
    student: nn.Module, sets: Sequence[SparseImages], weight: float, size: tuple[int, int], device: torch.device
) -> Relabelling:
    patch_size = require_patch_tokens(student, weight)
    return Relabelling(student, sets, torch.cat([coverage(each, patch_size, size) for each in sets]).to(device))


def shown_tokens(
    sets: Sequence[SparseImages], patch_size: tuple[int, int], size: tuple[int, int] | None = None
) -> Tensor:
    """Ascending indices (images, k) of the patches that lie most under kept ones.

    One k for all, so that they share a batch: the mean number kept, rounded up.
    """
    cover = torch.cat([coverage(each, patch_size, size) for each in sets])
    count = math.ceil(float(cover.sum(dtype=torch.float64)) / len(cover) - 1e-4)  # shares of a third are not exact
    return cover.topk(max(1, count), dim=1).indices.sort(dim=1).values


def coverage(images: SparseImages, patch_size: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Share (b, n) of each patch of another grid that lies under kept patches, with the images shown at `size`."""
    ph, pw = images.patch_size
    pixels = images.mask.float().repeat_interleave(ph, 1).repeat_interleave(pw, 2)
    return F.avg_pool2d(pixels[:, None] if size is None else resize(pixels[:, None], size), patch_size).flatten(1)
