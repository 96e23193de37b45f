"""Many small worlds in which it is known who was a member, and what is said about each of them.

In each world a model is trained on half of the examples, inverted, and a student is distilled from its images.
Each world in turn is the one under attack, and the others are the attacker's. Some examples are canaries,
with a label that is wrong: nobody knows such a thing who has not seen it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from smi_fed.audit.lira import Leak, confidences, leak_of, likelihood_ratios
from smi_fed.audit.nearest import Nearness, cosines, nearness, ssim
from smi_fed.checks import Allowed, Natural, checked
from smi_fed.class_statistics import features
from smi_fed.data import ImageSet
from smi_fed.inversion import feature_statistics
from smi_fed.models import Classifier, ModelSpec, build_seeded
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, distill_student, invert_teacher, seeded
from smi_fed.progress import Bar
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import is_token_model
from smi_fed.training import predict, train
from smi_fed.training_config import TrainingConfig

Device = torch.device
CPU = Device("cpu")
HELD_BY = ("model", "student")


@checked
class AuditConfig:
    """How it is audited.

    Args:
        worlds: models that are trained, each on half of the examples; at least 4, and 16 for figures to rely on.
        canaries: examples whose label is replaced by another.
    """

    worlds: Annotated[int, Field(strict=True, ge=4), Allowed("an int >= 4")] = 16
    canaries: Natural = 50


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        examples: of whom it was asked whether they are members, by `model` and `student`.
        canaries: the same of canaries alone; empty without.
        ssim, features: of synthetic images to training images and to others; features are those of the model.
        accuracy: of models and students on test images, means over the worlds.
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


@dataclass(frozen=True)
class Recipe:
    """What happens in a world.

    Attributes:
        model, student: architectures.
        training: of the model.
        pipeline: inversion and distillation.
        statistics: whether the server has feature statistics, for inversion's prior, of a model with patch tokens.
        counts: whether it has label counts, for what is inverted.
    """

    model: ModelSpec
    student: ModelSpec
    training: TrainingConfig
    pipeline: PipelineConfig
    statistics: bool = True
    counts: bool = True


def with_canaries(data: ImageSet, count: int, generator: torch.Generator) -> tuple[ImageSet, Tensor]:
    """The same images, `count` of them with another label; and which (n,) bool."""
    labels, classes = data.labels.clone(), len(data.class_names)
    rows = torch.randperm(len(data), generator=generator)[:count]
    labels[rows] = (labels[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[rows] = True
    return ImageSet(data.images, labels, data.class_names), chosen


def memberships(worlds: int, examples: int, generator: torch.Generator) -> Tensor:
    """(worlds, examples) bool: each example is in half of the worlds, as the paper has it."""
    order = torch.rand(worlds, examples, generator=generator).argsort(0)
    return order < worlds // 2


def audited(
    recipe: Recipe, data: ImageSet, test: ImageSet, config: AuditConfig, seed: int = 0, device: Device = CPU
) -> Audit:
    """Train, invert and distill in every world, and attack each with the others.

    Args:
        data: labelled images, of which each world has half; in memory.
        test: for accuracies.
    """
    marked, canary = with_canaries(data, config.canaries, seeded(seed, 1))
    inside = memberships(config.worlds, len(marked), seeded(seed, 2))
    seen: dict[str, list[Tensor]] = {held: [] for held in HELD_BY}
    right: dict[str, list[float]] = {held: [] for held in HELD_BY}
    near: dict[str, list[Nearness]] = {"ssim": [], "features": []}
    with Bar("audit", config.worlds, unit="world") as bar:
        for number, members in enumerate(inside):
            model, images, student = _world(recipe, marked.select(members.nonzero()[:, 0]), seed, number, device)
            for held, network in (("model", model), ("student", student)):
                seen[held].append(confidences(predict(network, marked.images), marked.labels))
                hits = predict(network, test.images).argmax(1) == test.labels
                right[held].append(float(hits.float().mean()))
            for kind, found in _nearnesses(model, images, marked, members).items():
                near[kind].append(found)
            bar.at(number + 1)
    by_held = {held: _ratios(torch.stack(each), inside) for held, each in seen.items()}
    return Audit(
        examples={held: leak_of(scores[:, ~canary].flatten(), inside[:, ~canary].flatten())
                  for held, scores in by_held.items()},
        canaries={held: leak_of(scores[:, canary].flatten(), inside[:, canary].flatten())
                  for held, scores in by_held.items() if canary.any()},
        ssim=_mean(near["ssim"]), features=_mean(near["features"]),
        accuracy={held: sum(each) / len(each) for held, each in right.items()}, worlds=config.worlds,
    )  # fmt: skip


def _world(
    recipe: Recipe, data: ImageSet, seed: int, number: int, device: Device
) -> tuple[Classifier, SparseImages, Classifier]:
    """A trained model, its images and their student."""
    model = build_seeded(recipe.model, seed * 1_000_003 + number).to(device)
    train(model, data, recipe.training, generator=seeded(seed, 3, number))
    counts = tuple(data.label_counts().tolist()) if recipe.counts else None
    told = recipe.statistics and is_token_model(model.backbone)
    known = feature_statistics(model, data.images.split(256)) if told else None
    teacher = TrainedTeacher(f"world {number}", model, len(data), counts, known)
    images, _ = invert_teacher(teacher, 0, recipe.pipeline, seeded(seed, 4, number), show=lambda _: None)
    student = build_seeded(recipe.student, seed).to(device)
    distill_student(student, [teacher], [images], recipe.pipeline.distillation, seeded(seed, 5, number))
    return model, images, student


def _ratios(seen: Tensor, inside: Tensor) -> Tensor:
    """(worlds, n): each world attacked by all the others."""
    rows = torch.arange(len(seen))
    return torch.stack([
        likelihood_ratios(seen[world], seen[rows != world], inside[rows != world]) for world in range(len(seen))
    ])  # fmt: skip


def _nearnesses(model: Classifier, images: SparseImages, data: ImageSet, members: Tensor) -> dict[str, Nearness]:
    """By pixels and by the model's own features."""
    shown, whole = images.images, data.images[torch.arange(len(data))]
    with torch.no_grad():
        own, theirs = (torch.cat([features(model, part).cpu() for part in each.split(256)]) for each in (shown, whole))
    found = {"ssim": ssim(shown, whole), "features": cosines(own, theirs)}
    return {kind: nearness(each[:, members], each[:, ~members]) for kind, each in found.items()}


def _mean(found: list[Nearness]) -> Nearness:
    return Nearness(*(sum(getattr(each, key) for each in found) / len(found)
                      for key in ("nearer", "training", "held_out")))  # fmt: skip
