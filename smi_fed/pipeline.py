"""Teachers in, student out: inversion of each, distillation of all. Knows nothing of Flower."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from smi_fed.alignment import Aligned, align_targets
from smi_fed.checks import Count, checked
from smi_fed.data import ImageSet
from smi_fed.distillation import (
    DistillationConfig,
    DistillationRecord,
    distill,
    ensemble_probabilities,
    ensemble_weights,
)
from smi_fed.inversion import (
    FeatureStatistics,
    InversionConfig,
    InversionProgress,
    SparseImages,
    StopSchedule,
    invert,
    trajectories,
)
from smi_fed.inversion.batch_norm import batch_norms
from smi_fed.inversion.flops import spent_flops, trajectory_flops
from smi_fed.models import Classifier
from smi_fed.pool import Entry, start_from
from smi_fed.progress import Bar, show_inversion
from smi_fed.training import predict

log = logging.getLogger("smi_fed")


@dataclass(frozen=True, eq=False)
class TrainedTeacher:
    """A client's model on the server, after admission.

    Attributes:
        name: how the client is called in reports.
        model: its classifier.
        num_examples: that it claims to have trained on, capped.
        label_counts: examples of each of its own classes, as it told them; None where it did not.
        statistics: for the feature-statistics prior; None where the client did not send them.
        classes: for each of its classes the index among the student's; None where they are the same.
        num_classes: the student's; None where `classes` is.
    """

    name: str
    model: Classifier
    num_examples: int
    label_counts: tuple[int, ...] | None = None
    statistics: FeatureStatistics | None = None
    classes: tuple[int, ...] | None = None
    num_classes: int | None = None

    @property
    def aligned(self) -> Aligned:
        """The model in the student's terms: any image size in, the student's classes out."""
        own = self.model.spec.num_classes
        return Aligned(self.model, self.classes or range(own), self.num_classes or own)

    @property
    def aligned_counts(self) -> tuple[float, ...]:
        """Examples of each of the student's classes, `num_examples` together.

        In the proportions that the client told; evenly over its classes where it told none.
        """
        own = self.model.spec.num_classes
        told = self.label_counts or (1,) * own
        counts = [0.0] * (self.num_classes or own)
        for place, count in zip(self.classes or range(own), told, strict=True):
            counts[place] = self.num_examples * count / max(1, sum(told))
        return tuple(counts)


@checked
class PipelineConfig:
    """Settings of the server's work.

    Args:
        images_per_teacher: synthetic images of each teacher, at least 1.
        inversion, distillation: see there.

    Raises:
        SettingError: naming what cannot be.
    """

    images_per_teacher: Count = 300
    inversion: InversionConfig = field(default_factory=InversionConfig.paper)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)


@dataclass(frozen=True)
class InversionRecord:
    """What the inversion of one teacher took: seconds, and FLOPs beside those of dense."""

    seconds: float
    flops: int
    dense_flops: int


def seeded(*numbers: int) -> torch.Generator:
    """A generator for one purpose, named by numbers (seed, round, teacher, ...)."""
    state = 0
    for number in numbers:
        state = (state * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


def draw_targets(teacher: TrainedTeacher, count: int, generator: torch.Generator) -> Tensor:
    """Classes (count,) to synthesise: in the client's own proportions where it told them, else evenly."""
    classes = teacher.model.spec.num_classes
    counts = teacher.label_counts or (1,) * classes
    weights = torch.tensor(counts, dtype=torch.float64)
    if float(weights.sum()) == 0:
        weights = torch.ones(classes, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def own_priors(teacher: TrainedTeacher, config: InversionConfig) -> InversionConfig:
    """`config` less the priors that this teacher cannot have; a line of log says which, and why.

    Feature statistics come from clients with enough examples and patch tokens; running
    statistics from models with BatchNorm.
    """
    if config.statistics and teacher.statistics is None:
        log.warning("%s sent no feature statistics: inverted without that prior", teacher.name)
        config = replace(config, statistics=0.0)
    if config.batchnorm and not batch_norms(teacher.model):
        log.info("%s has no BatchNorm: inverted without that prior", teacher.name)
        config = replace(config, batchnorm=0.0)
    return config


def invert_teacher(
    teacher: TrainedTeacher,
    number: int,
    config: PipelineConfig,
    generator: torch.Generator,
    *,
    last: SparseImages | None = None,
    checkpoint: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[SparseImages, InversionRecord]:
    """Synthetic images of one teacher, with a progress bar.

    Each prior is for the teachers that can have it, see `own_priors`. Where one trajectory
    gives several images (rebirth) as many are begun as it takes for `images_per_teacher`.

    Args:
        last: this client's images of an earlier round, to start from; each for a target of its class.
        checkpoint: directory of this inversion, see `invert`.
        clock: what the record's seconds are of.
    """
    inversion = own_priors(teacher, config.inversion)
    targets = draw_targets(teacher, trajectories(teacher.model, inversion, config.images_per_teacher), generator)
    warm = start_from(last, targets) if last is not None else None
    started, spent = clock(), dict[int, int]()

    def show(now: InversionProgress) -> None:
        spent.update(now.spent)
        show_inversion(bar, now)

    with Bar(f"inversion of {teacher.name}", inversion.iterations) as bar:
        images = invert(
            teacher.model,
            targets,
            inversion,
            generator=generator,
            statistics=teacher.statistics,
            warm=warm,
            teacher_id=number,
            checkpoint=checkpoint,
            progress=show,
        ).select(slice(config.images_per_teacher))
    seconds = clock() - started
    dense = replace(inversion, schedule=StopSchedule(), adaptive=False)
    dense_flops = len(images) * trajectory_flops(teacher.model, dense, teacher.statistics)
    return images, InversionRecord(seconds, _flops(teacher, inversion, spent, len(targets)), dense_flops)


def _flops(teacher: TrainedTeacher, config: InversionConfig, spent: Mapping[int, int], targets: int) -> int:
    if not spent:  # the checkpoint was of a finished inversion, and nothing was left to do
        return targets * trajectory_flops(teacher.model, config, teacher.statistics)
    return spent_flops(teacher.model, config, spent, targets, teacher.statistics)


def weights_of(teachers: Sequence[TrainedTeacher], kind: str) -> Tensor:
    """Ensemble weights (teachers, classes or 1) of these teachers."""
    return ensemble_weights(kind, [t.num_examples for t in teachers], [t.aligned_counts for t in teachers])


def distill_student(
    student: Classifier,
    teachers: Sequence[TrainedTeacher],
    images: Sequence[SparseImages],
    config: DistillationConfig,
    generator: torch.Generator,
    shares: Tensor | None = None,
    reused: Sequence[Entry] = (),
) -> DistillationRecord:
    """Teach `student` in place what all teachers say of all images, with a progress bar.

    Args:
        images: of each teacher, in the order of `teachers`; targets in its own classes.
        shares: (images,) how often each is drawn, those of `reused` last; None is evenly.
        reused: images of earlier rounds, whose teachers need not be there any more.

    Raises:
        ValueError: another number of sets than of teachers, or what `distill` refuses.
    """
    sets = [align_targets(each, teacher.classes) for teacher, each in zip(teachers, images, strict=True)]
    sets += [align_targets(entry.images, entry.classes) for entry in reused]
    with Bar("distillation", config.steps, unit="step") as bar:
        return distill(
            student,
            [teacher.aligned for teacher in teachers],
            sets,
            config,
            generator=generator,
            weights=weights_of(teachers, config.ensemble),
            shares=shares,
            progress=lambda step, loss: bar.at(step, loss=loss),
        )


def ensemble_accuracy(teachers: Sequence[TrainedTeacher], kind: str, test: ImageSet) -> float:
    """Accuracy of the ensemble as used in distilling, at temperature 1; in [0, 1]."""
    return float((ensemble_classes(teachers, kind, test.images) == test.labels).float().mean())


def ensemble_classes(teachers: Sequence[TrainedTeacher], kind: str, images: Tensor) -> Tensor:
    """The student's class (n,) that the ensemble names for each image."""
    logits = [predict(teacher.aligned, images) for teacher in teachers]
    return ensemble_probabilities(logits, weights_of(teachers, kind)).argmax(1)
