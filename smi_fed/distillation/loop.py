"""A student taught by several teachers on synthetic images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smi_fed.ahead import ahead, in_turn
from smi_fed.augmentation import augmentation
from smi_fed.distillation.asking import Asking, sampled_answers
from smi_fed.distillation.config import BY_CERTAINTY, DistillationConfig, DistillationRecord
from smi_fed.distillation.ensembles import ensemble_answers
from smi_fed.distillation.shown import Shown
from smi_fed.distillation.views import Draw, draw, show, unchanged
from smi_fed.distillation.watching import Ask, Watch, divide
from smi_fed.lazy import one_by_one
from smi_fed.models import Classifier, logits_of, unwrapped
from smi_fed.sparse_images import SparseImages, classes_of
from smi_fed.training import Optimiser, computing, evaluating, seeded_torch
from smi_fed.tuning import only_trained, training_mode

log = logging.getLogger("smi_fed")

BLOCK_BYTES, FIRST_STEPS, BLOCK_STEPS = 2**27, 8, 100
"""Views of at most so many bytes are shown to one teacher after the other at a time: of few steps at first, of twice
as many each time up to the most, so that the student begins early."""


def distill(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    images: SparseImages | Sequence[SparseImages],
    config: DistillationConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
    shares: Tensor | None = None,
    owners: Tensor | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> DistillationRecord:
    """Teach `student`, in place and on its own device, what the teachers say of the images.

    Minimises T^2 KL(ensemble || student) at temperature T (Hinton et al., 2015) over
    shifted and mixed synthetic images, and `config.relabel` times the same for each patch
    token and its label. The student is left in evaluation mode; teachers are left as they were.
    Where `config.validation` holds images out it is never left worse on them than it came.

    Teachers answer ahead of the student, for a block of steps one after the other, and images are
    read for a block at a time; a thread does so for the next block while the student takes its
    steps (`smi_fed.ahead`). Student and losses are those of doing all in turn, bit for bit: where
    augmentation or the student draws from torch's own state, it is done in turn. A sequence that
    loads a teacher or a set when it is asked for (`smi_fed.lazy.Lazily`) is in memory one item at a time.

    Args:
        teachers: modules that take images in [0, 1] and answer with logits, or with an output that
            has `.logits`; a `Classifier` is shown them at its own size, each in its own dtype.
        images: one set or several (of different patch and image size; they are shown at the student's);
            for relabelling their targets are the student's classes.
        generator: source of every random choice, those of dropout too; a fresh seed of 0 when None.
        weights: (teachers, classes) or (teachers, 1), from `ensemble_weights`; None is uniform,
            whatever `config.ensemble` says of them: only the caller knows what clients told of their
            data. By `certainty` teachers are weighted for each image besides, where it says so. The agreement that
            `config.robust` may ask for is the caller's too (`smi_fed.distillation.opinions`).
        shares: (images,) how often each image is drawn, not normalised; None is evenly.
        owners: (images,) the number of the teacher that each image was made from, -1 for none of these. Where there
            are many teachers, `config.others` of the others are asked of an image; None asks all of them.
        progress: called with (steps done, loss tensor) after every step.

    Raises:
        ValueError: before the student is changed, for no teachers, no images, weights or shares of
            another shape, a student among its teachers, other classes than the teachers' or fewer
            than two, or `tokens` other than all for a student without tokens; for relabelling what
            `smi_fed.relabelling.Relabelling` refuses.
    """
    config = config or DistillationConfig()
    generator = generator or torch.Generator().manual_seed(0)
    sets = [images] if isinstance(images, SparseImages) else images
    device = next(student.parameters()).device
    count = sum(one_by_one(sets, len))
    weights = _checked_weights(weights, len(teachers), count, shares).to(device)
    first = sets[0].images.shape
    inner = unwrapped(student)
    size = inner.image_size if isinstance(inner, Classifier) else (first[2], first[3])
    shares, held = divide(sets, config, shares, generator)
    config = config.over(count - len(held))
    shown = Shown(student, sets, config, size, device)

    asking = _asking(config, owners, sets, weights)

    def ask(draws: Sequence[Draw], views: Sequence[Tensor]) -> list[Tensor]:
        common, sure = (_others(student, teachers), views, weights, config.temperature), config.ensemble in BY_CERTAINTY
        with computing(config, device):
            if asking is None:
                return ensemble_answers(*common, by_certainty=sure, robust=config.robust)
            return sampled_answers(*common, [each.asked for each in draws if each.asked is not None], by_certainty=sure)

    started, losses = time.perf_counter(), list[Tensor]()
    if not config.steps:
        student.eval()
        return DistillationRecord()
    with only_trained(student, config.trainable), seeded_torch(generator):
        left = unchanged(held, generator, asking if len(held) else None)
        optimiser, watch = Optimiser(student, config), Watch(student, sets, left, config, ask, size)
        start = [weight.detach().clone() for weight in optimiser.weights] if config.anchor else []
        with closing(_lessons(student, sets, config, shares, ask, size, count, generator, asking)) as lessons:
            for step, drawn, view, probabilities in lessons:
                if step == 1:
                    watch.begin()
                with computing(config, device):
                    loss = shown.loss(view, drawn, probabilities)
                optimiser.step(loss + config.anchor * _half_square(optimiser.weights, start) if start else loss)
                losses.append(loss.detach())
                if progress is not None:
                    progress(step, losses[-1])
                if watch.done(step):
                    log.info("early stop after %d of %d steps", step, config.steps)
                    break
        kept = watch.keep(len(losses))
    return DistillationRecord(len(losses), time.perf_counter() - started, torch.stack(losses).tolist(), kept)


def _half_square(weights: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """Half of the squared distance of weights from where they started."""
    return torch.stack([(w - s).square().sum() for w, s in zip(weights, start, strict=True)]).sum() / 2


def _lessons(
    student: nn.Module, sets: Sequence[SparseImages], config: DistillationConfig, shares: Tensor | None,
    ask: Ask, size: tuple[int, int], count: int, generator: torch.Generator, asking: Asking | None,
) -> Generator[tuple[int, Draw, Tensor, Tensor], None, None]:  # fmt: skip
    """Of each step its number from 1, what is drawn among `count` images, the view, and what the ensemble says of it.

    The student is in training mode while a step is taken, and in evaluation mode after that.
    """
    device, change = next(student.parameters()).device, augmentation(config.augmentation)
    numbers = len(sets[0].images[0]) * size[0] * size[1]
    known = _asked_once(sets, config, ask, size, count, device, partial(unchanged, generator=generator, asking=asking))

    def block(steps: range) -> Callable[[], tuple[range, list[Draw], list[Tensor], list[Tensor]]]:
        draws = [draw(config, count, shares, generator, asking if known is None else None) for _ in steps]

        def make() -> tuple[range, list[Draw], list[Tensor], list[Tensor]]:
            views = [change(view) for view in show(sets, draws, size, device)]
            return steps, draws, views, ask(draws, views) if known is None else [known[each.rows] for each in draws]

        return make

    def taken(steps: range, *lessons: Any) -> Generator[tuple[int, Draw, Tensor, Tensor], None, None]:
        training_mode(student, config.trainable)
        try:
            yield from zip([step + 1 for step in steps], *lessons, strict=True)
        finally:
            student.eval()

    before = torch.get_rng_state()
    blocks = map(block, _blocks(config.steps, config.batch_size * numbers, FIRST_STEPS))
    steps, draws, views, answers = next(blocks)()
    _check_classes(student, answers[0], views[0])
    yield from taken(steps, draws, views, answers)
    quiet = torch.equal(before, torch.get_rng_state())
    del draws, views, answers  # before the next ones are made
    with closing(ahead(blocks, device) if quiet else in_turn(blocks)) as rest:
        for lesson in rest:
            yield from taken(*lesson)
            del lesson  # before the one after the next is made


def _asked_once(
    sets: Sequence[SparseImages], config: DistillationConfig, ask: Ask, size: tuple[int, int], count: int,
    device: torch.device, drawn: Callable[[Tensor], Draw],
) -> Tensor | None:  # fmt: skip
    """What the ensemble says of every image (count, classes); None where views differ, or where fewer are shown."""
    if not config.same_views or config.steps * config.batch_size < count:
        return None
    parts = torch.arange(count).split(config.batch_size)
    blocks = _blocks(len(parts), config.batch_size * len(sets[0].images[0]) * size[0] * size[1])
    draws = ([drawn(parts[i]) for i in block] for block in blocks)
    return torch.cat([answers for each in draws for answers in ask(each, show(sets, each, size, device))])


def _asking(
    config: DistillationConfig, owners: Tensor | None, sets: Sequence[SparseImages], weights: Tensor
) -> Asking | None:
    """How teachers are drawn; None where all are asked: there are few, or they are not joined by a mean."""
    few = config.others is None or len(weights) <= config.others + 2  # an image may be mixed of two teachers' own
    if owners is None or few or not config.robust.in_turn:
        return None
    assert config.others is not None
    return Asking(owners, torch.cat(one_by_one(sets, classes_of)), weights.cpu(), config.others)


def _blocks(steps: int, numbers: int, first: int = BLOCK_STEPS) -> list[range]:
    """All steps in blocks, each of at least one, `first` at first; `numbers` are those of one step's images."""
    most = max(1, min(BLOCK_STEPS, BLOCK_BYTES // (4 * numbers)))
    blocks, length = [range(0)], min(first, most)
    while blocks[-1].stop < steps:
        begin = blocks[-1].stop
        blocks.append(range(begin, min(begin + length, steps)))
        length = min(2 * length, most)
    return blocks[1:]


def _checked_weights(weights: Tensor | None, teachers: int, images: int, shares: Tensor | None) -> Tensor:
    if not teachers or not images:
        raise ValueError(f"distill: got {teachers} teachers and {images} images, need both")
    if shares is not None and tuple(shares.shape) != (images,):
        raise ValueError(f"shares: got shape {tuple(shares.shape)}, allowed: ({images},), one for each image")
    if weights is None:
        return torch.full((teachers, 1), 1 / teachers)
    if weights.ndim != 2 or len(weights) != teachers:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, allowed: ({teachers}, classes) or ({teachers}, 1), "
            "one row for each teacher"
        )
    return weights


def _others(student: nn.Module, teachers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The teachers one by one, none of which may share weights with the student."""
    own = {id(weight) for weight in student.parameters()}
    for number in range(len(teachers)):
        teacher = teachers[number]
        if any(id(weight) in own for weight in teacher.parameters()):
            raise ValueError(f"teachers: got the student itself as number {number}, allowed: a copy (copy.deepcopy)")
        yield teacher
        del teacher  # before the next one is loaded


def _check_classes(student: nn.Module, answers: Tensor, view: Tensor) -> None:
    """Refuse answers that would broadcast over the student's classes, or that teach nothing."""
    inner = unwrapped(student)
    if isinstance(inner, Classifier):
        classes = inner.spec.num_classes
    else:
        with evaluating(student), torch.no_grad():
            classes = logits_of(student(view[:1])).shape[1]
    if answers.shape[1] != classes or classes < 2:
        raise ValueError(
            f"teachers: got {answers.shape[1]} classes for a student of {classes}, allowed: the same classes, at least "
            "2 (softmax over one class always says 1); smi_fed.alignment.Aligned puts a teacher's into the student's"
        )
