"""Teachers in, student out: inversion of each, distillation of all. Knows nothing of Flower."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smi_fed.alignment import align_targets
from smi_fed.checks import Count, checked
from smi_fed.distillation import (
    BY_CERTAINTY,
    Agreement,
    DistillationConfig,
    DistillationRecord,
    Joining,
    Opinion,
    distill,
    ensemble_probabilities,
    ensemble_weights,
    opinions,
)
from smi_fed.inversion import (
    InversionConfig,
    InversionProgress,
    SparseImages,
    StopSchedule,
    invert,
    trajectories,
)
from smi_fed.inversion.batch_norm import batch_norms
from smi_fed.inversion.checkpoint import stored_spent
from smi_fed.inversion.flops import spent_flops, trajectory_flops
from smi_fed.lazy import Lazily
from smi_fed.models import Classifier
from smi_fed.pool import Entry, at_hand, start_from
from smi_fed.progress import Bar, show_inversion
from smi_fed.sparse_images import StoredImages
from smi_fed.teachers import AnyTeacher, TrainedTeacher

log = logging.getLogger("smi_fed")


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
    """What the inversion of one teacher took and gave.

    Attributes:
        seconds: of this process.
        flops: that were spent on it, before a restart too.
        dense_flops: that dense inversion spends on as many images.
        images: how many there are.
        kept_fraction: mean share of patches that were optimised to the end.
    """

    seconds: float
    flops: int
    dense_flops: int
    images: int = 0
    kept_fraction: float = 1.0


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
    teacher_id: int,
    config: PipelineConfig,
    generator: torch.Generator,
    *,
    last: SparseImages | None = None,
    checkpoint: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
    show: Callable[[InversionProgress], None] | None = None,
) -> tuple[SparseImages, InversionRecord]:
    """Synthetic images of one teacher.

    Each prior is for the teachers that can have it, see `own_priors`. Where one trajectory
    gives several images (rebirth) as many are begun as it takes for `images_per_teacher`.

    Args:
        teacher_id: stored with the images.
        last: this client's images of an earlier round, to start from; each for a target of its class.
        checkpoint: directory of this inversion, see `invert`.
        clock: what the record's seconds are of.
        show: called with the progress; None draws a bar.
    """
    inversion = own_priors(teacher, config.inversion)
    targets = draw_targets(teacher, trajectories(teacher.model, inversion, config.images_per_teacher), generator)
    warm = start_from(last, targets) if last is not None else None
    started, spent = clock(), dict[int, int]()

    def note(now: InversionProgress) -> None:
        spent.update(now.spent)
        told(now)

    with _shown(f"inversion of {teacher.name}", inversion.iterations, show) as told:
        images = invert(
            teacher.model,
            targets,
            inversion,
            generator=generator,
            statistics=teacher.statistics,
            warm=warm,
            teacher_id=teacher_id,
            checkpoint=checkpoint,
            progress=note,
        ).select(slice(config.images_per_teacher))
    seconds = clock() - started
    if not spent and checkpoint is not None:  # it was of a finished inversion, and nothing was left to do
        spent = stored_spent(checkpoint)
    dense = replace(inversion, schedule=StopSchedule())
    return images, InversionRecord(
        seconds,
        spent_flops(teacher.model, inversion, spent, len(targets), teacher.statistics),
        len(images) * trajectory_flops(teacher.model, dense, teacher.statistics),
        len(images),
        images.kept_fraction,
    )


@contextmanager
def _shown(
    label: str, total: int, show: Callable[[InversionProgress], None] | None
) -> Iterator[Callable[[InversionProgress], None]]:
    if show is not None:
        yield show
        return
    with Bar(label, total) as bar:
        yield partial(show_inversion, bar)


def weights_of(teachers: Sequence[AnyTeacher], kind: str, factors: Sequence[float] | None = None) -> Tensor:
    """Ensemble weights (teachers, classes or 1) of these teachers.

    Args:
        factors: of each teacher's weights, beside its own `factor`; None is 1.
    """
    own = [teacher.factor for teacher in teachers]
    together = own if factors is None else [a * b for a, b in zip(own, factors, strict=True)]
    counts = [teacher.aligned_counts for teacher in teachers]
    return ensemble_weights(kind, [teacher.num_examples for teacher in teachers], counts, together)


def joint_probabilities(
    logits: Iterable[Tensor],
    teachers: Sequence[AnyTeacher],
    kind: str,
    factors: Sequence[float] | None = None,
    robust: Joining | None = None,
) -> Tensor:
    """What these teachers say together (n, classes), by their logits, at temperature 1."""
    weights = weights_of(teachers, kind, factors)
    return ensemble_probabilities(logits, weights, by_certainty=kind in BY_CERTAINTY, robust=robust)


def opinions_of(
    teachers: Sequence[AnyTeacher], images: Sequence[SparseImages | StoredImages], config: Agreement
) -> list[Opinion]:
    """What the others' images say of each teacher, see `smi_fed.distillation.opinions`; one teacher is in memory."""
    counts = torch.tensor([teacher.aligned_counts for teacher in teachers])
    sets = list(zip(images, [teacher.classes for teacher in teachers], strict=True))
    aligned = Lazily(sets, lambda each: align_targets(at_hand(each[0]), each[1]))
    return opinions(Lazily(teachers, lambda teacher: teacher.aligned), aligned, counts, config)


def distill_student(
    student: Classifier,
    teachers: Sequence[AnyTeacher],
    images: Sequence[SparseImages | StoredImages],
    config: DistillationConfig,
    generator: torch.Generator,
    shares: Tensor | None = None,
    reused: Sequence[Entry] = (),
    tell: Callable[..., None] | None = None,
    factors: Sequence[float] | None = None,
) -> DistillationRecord:
    """Teach `student` in place what all teachers say of all images, with a progress bar.

    Of what is stored one teacher and one set of images is in memory at a time.

    Args:
        images: of each teacher, in the order of `teachers`; targets in its own classes.
        shares: (images,) how often each is drawn, those of `reused` last; None is evenly.
        reused: images of earlier rounds, whose teachers need not be there any more.
        tell: told of the progress, see `Bar`.
        factors: of each teacher's weights in the ensemble and of how often its images are drawn; None is 1 for each.

    Raises:
        ValueError: another number of sets than of teachers, or what `distill` refuses.
    """
    sets = [(each, teacher.classes) for teacher, each in zip(teachers, images, strict=True)]
    sets += [(entry, entry.classes) for entry in reused]
    counts = torch.tensor([len(each) for each, _ in sets])
    own = list(factors or [1.0] * len(teachers))
    if any(factor != 1 for factor in own):
        drawn = torch.tensor([*own, *[1.0] * len(reused)], dtype=torch.float64).repeat_interleave(counts)
        shares = drawn if shares is None else shares * drawn
    heard = [teacher for teacher, factor in zip(teachers, own, strict=True) if factor]
    places = iter(range(len(heard)))
    owners = torch.tensor([*(next(places) if factor else -1 for factor in own), *[-1] * len(reused)])
    with Bar("distillation", config.steps, unit="step", tell=tell, times=100) as bar:
        return distill(
            student,
            Lazily(heard, lambda teacher: teacher.aligned),
            Lazily(sets, lambda each: align_targets(at_hand(each[0]), each[1])),
            config,
            generator=generator,
            weights=weights_of(heard, config.ensemble, [factor for factor in own if factor]),
            shares=shares,
            owners=owners.repeat_interleave(counts),
            progress=lambda step, loss: bar.at(step, loss=loss),
        )
