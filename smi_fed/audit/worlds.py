"""Many small worlds in which it is known who was a member, and what is said about each of them.

In each world a model is trained on half of the examples, inverted, and a student is distilled from its images.
Some examples are canaries, with a label that is wrong: nobody knows such a thing who has not seen it.
A world is a function of the seed and its number, so that the worlds of an audit can be made in several processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from smi_fed.audit.lira import confidences
from smi_fed.audit.local_privacy import LocalPrivacy, release
from smi_fed.audit.nearest import Nearness, cosines, nearness, resemblance, ssim
from smi_fed.checks import Allowed, Natural, checked
from smi_fed.class_statistics import features
from smi_fed.data import ImageSet
from smi_fed.inversion import feature_statistics
from smi_fed.models import Classifier, ModelSpec, build_seeded
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, distill_student, invert_teacher, seeded
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import is_token_model
from smi_fed.training import accuracy, predict, train
from smi_fed.training_config import TrainingConfig

Device = torch.device
CPU = Device("cpu")
HELD_BY = ("model", "student", "images")
"""What an attacker may hold."""


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
class Recipe:
    """What happens in a world.

    Attributes:
        model, student: architectures.
        training: of the model.
        pipeline: inversion and distillation.
        statistics: whether the server has feature statistics, for inversion's prior, of a model with patch tokens.
        counts: whether it has label counts, for what is inverted.
        privacy: what the client does to its update before it sends it; its model starts from what the server sent.
    """

    model: ModelSpec
    student: ModelSpec
    training: TrainingConfig
    pipeline: PipelineConfig
    statistics: bool = True
    counts: bool = True
    privacy: LocalPrivacy | None = None


@dataclass(frozen=True)
class World:
    """What a world tells of the examples.

    Attributes:
        members: (n,) bool, who was trained on.
        seen: for each of `HELD_BY` a score of each example (n,) float64: how sure it is of the example's label,
            or how much the images resemble the example.
        accuracy: of `model` and `student` on test images, and of `model on its own` examples, canaries among them.
        near: of the images, by `ssim` and the model's `features`.
    """

    members: Tensor
    seen: dict[str, Tensor]
    accuracy: dict[str, float]
    near: dict[str, Nearness]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        lists = {held: scores.tolist() for held, scores in self.seen.items()}
        return {**asdict(self), "members": self.members.tolist(), "seen": lists}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> World:
        """From what `plain` gave."""
        seen = {held: torch.tensor(scores, dtype=torch.float64) for held, scores in plain["seen"].items()}
        near = {kind: Nearness(**found) for kind, found in plain["near"].items()}
        return cls(torch.tensor(plain["members"], dtype=torch.bool), seen, plain["accuracy"], near)


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


def marked(data: ImageSet, config: AuditConfig, seed: int) -> tuple[ImageSet, Tensor]:
    """The examples of an audit, with its canaries; and which these are (n,) bool."""
    return with_canaries(data, config.canaries, seeded(seed, 1))


def world(
    recipe: Recipe, data: ImageSet, test: ImageSet, config: AuditConfig, seed: int, number: int, device: Device = CPU
) -> World:
    """World `number` of an audit: train, release, invert and distill, and look at every example.

    Args:
        data: labelled images, of which each world has half; in memory.
        test: for accuracies.
    """
    examples, _ = marked(data, config, seed)
    members = memberships(config.worlds, len(examples), seeded(seed, 2))[number]
    own = examples.select(members.nonzero()[:, 0])
    model, images, student = _released(recipe, own, seed, number, device)
    seen = {
        held: confidences(predict(network, examples.images), examples.labels)
        for held, network in (("model", model), ("student", student))
    }
    whole = examples.images[torch.arange(len(examples))]
    similar = {"ssim": ssim(images.images, whole), "features": _alike(model, images.images, whole)}
    seen["images"] = resemblance(similar["ssim"], images.targets, examples.labels)
    right = {
        "model": accuracy(model, test),
        "model on its own": accuracy(model, own),
        "student": accuracy(student, test),
    }
    near = {kind: nearness(each[:, members], each[:, ~members]) for kind, each in similar.items()}
    return World(members, seen, right, near)


def _released(
    recipe: Recipe, data: ImageSet, seed: int, number: int, device: Device
) -> tuple[Classifier, SparseImages, Classifier]:
    """A model as its client sends it, its images and their student."""
    model = build_seeded(recipe.model, seed * 1_000_003 + number).to(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, data, recipe.training, generator=seeded(seed, 3, number))
    counts = tuple(data.label_counts().tolist()) if recipe.counts else None
    told = recipe.statistics and is_token_model(model.backbone)
    known = feature_statistics(model, data.images.split(256)) if told else None
    if recipe.privacy is not None:
        release(model, start, recipe.privacy, seeded(seed, 6, number))
    teacher = TrainedTeacher(f"world {number}", model, len(data), counts, known)
    images, _ = invert_teacher(teacher, 0, recipe.pipeline, seeded(seed, 4, number), show=lambda _: None)
    student = build_seeded(recipe.student, seed).to(device)
    distill_student(student, [teacher], [images], recipe.pipeline.distillation, seeded(seed, 5, number))
    return model, images, student


def _alike(model: Classifier, first: Tensor, second: Tensor) -> Tensor:
    """How much images are alike by the model's own features: (m, n)."""
    with torch.no_grad():
        own, theirs = (torch.cat([features(model, part).cpu() for part in each.split(256)]) for each in (first, second))
    return cosines(own, theirs)
