"""`invert`: batches through the loop, with progress, checkpoints and room for what does not fit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smi_fed.checks import require
from smi_fed.inversion import early_stop, randomness
from smi_fed.inversion.acceleration import accelerated
from smi_fed.inversion.adaptive import adapted_schedule, probe_cost
from smi_fed.inversion.checkpoint import Checkpoint, Work, identity_of, stored_key
from smi_fed.inversion.choices import Adaptive
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.inputs import check_prior, check_targets, check_warm
from smi_fed.inversion.loop import finish, parametrise, run, start
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.memory import fitting_batch
from smi_fed.inversion.state import Problem, State
from smi_fed.inversion.teacher import adapt, frozen
from smi_fed.sparse_images import SparseImages
from smi_fed.wrappers import unwrapped

log = logging.getLogger("smi_fed")


@dataclass(frozen=True)
class InversionProgress:
    """Where an inversion stands; handed to the caller after every iteration.

    Attributes:
        done, total: iterations over all batches; the total grows where a batch was halved. With
            early stop, where batches never end, in proportion to what is done of each image.
        images: images finished so far.
        kept, patches: patches in work and of the whole grid.
        spent: iterations of single images so far, by the number of patches they kept.
        loss: mean loss of the batch, a tensor so that nobody waits for the device unless
            the number is read.
        seconds: since the start.
    """

    done: int
    total: int
    images: int
    kept: int
    patches: int
    spent: Mapping[int, int]
    loss: Tensor
    seconds: float


def invert(
    model: nn.Module,
    targets: Tensor,
    config: InversionConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    statistics: FeatureStatistics | None = None,
    warm: SparseImages | None = None,
    teacher_id: int = 0,
    progress: Callable[[InversionProgress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 60.0,
) -> SparseImages:
    """Synthesise one image per target from what `model` has learnt.

    Args:
        model: a `smi_fed.models.Classifier` or a plain timm model, on the device to work on;
            wrappers of `torch.compile`, DataParallel and PEFT are seen through.
            Its weights, mode, hooks and gradient flags are as before afterwards, whatever
            happens inside.
        targets: (b,) integer class indices, or (b, classes) floats in [0, 1] for
            multi-label models.
        config: settings; None is the paper's.
        generator: one integer is drawn from it. Every choice is a function of that
            integer, the image's id (its place in `targets`) and the iteration. None draws
            from torch's own, and goes on with the checkpoint's integer where there is one.
        statistics: what the feature-statistics prior compares with. This prior and that of
            BatchNorm couple the images of a batch: with them `batch_size` is part of the
            result's identity.
        warm: images to start from: row r is where the image of id `warm.ids[r]` starts, which
            is its place in `targets`. The others start from noise.
        teacher_id: stored with the images.
        progress: called after every iteration.
        checkpoint: a directory of this inversion's own. The same call with the same
            directory goes on where a killed one was last written, to the same images, and
            returns at once where it was finished. Delete it when the images are safe.
        checkpoint_interval: least seconds between two writings, >= 0; what a kill can lose.

    Returns:
        The images of the last iterate, on the CPU, in order of their ids; with rebirth those
        of one target in a row, in the order in which they were finished.

    Raises:
        ValueError: targets, statistics or settings that do not fit the model; before any work.
        FileFormatError: the checkpoint is damaged or of another inversion.
        DivergedError: the model's gradients overflow.
        torch.OutOfMemoryError: not even one image fits, or a batch does not whose images the
            prior couples.
    """
    config, model = config or InversionConfig.paper(), unwrapped(model)
    teacher = adapt(model, config.patch_size)
    targets = check_targets(targets, teacher.classes).to(teacher.mean.device)
    check_prior(teacher, config, statistics)
    check_warm(teacher, warm, len(targets))
    require(checkpoint_interval >= 0, "checkpoint_interval", checkpoint_interval, "seconds >= 0")
    known = statistics.to(teacher.mean) if statistics is not None and config.statistics > 0 else None
    key = None if checkpoint is None or generator is not None else stored_key(checkpoint)
    key = randomness.draw_key(generator) if key is None else key
    problem = Problem(teacher, parametrise(teacher, config), config, key, known, warm)
    saved = None
    if checkpoint is not None:
        identity = identity_of(model, targets, problem, teacher_id)
        saved = Checkpoint(checkpoint, identity, checkpoint_interval)
    with frozen(model), accelerated(model, config), torch.enable_grad():
        work = (saved and saved.load(targets)) or _new_work(problem, targets)
        problem = replace(problem, config=replace(config, schedule=work.schedule))
        reporter = _Reporter(problem, work, len(targets), progress)
        for age, loss in _iterations(problem, work, targets, teacher_id, saved):
            reporter.at(age, loss)
            if saved is not None:
                saved.save_if_due(work)
        reporter.end()
    found = SparseImages.concat(work.finished)
    # Only early stop finishes later images first; the rest need no copy of all pixels.
    return found.select(found.ids.argsort(stable=True)) if early_stop.rule(problem) else found


def _new_work(problem: Problem, targets: Tensor) -> Work:
    """Nothing done yet, under the schedule that the teacher bears."""
    planned = problem.config.schedule
    size = _batch_size(problem, targets)
    if not isinstance(problem.config.planning, Adaptive):
        return Work(size, planned)
    schedule = adapted_schedule(problem, multi_label=targets.ndim == 2)
    log.info("stop schedule that this teacher's attention bears: '%s' of '%s'", schedule, planned)
    return Work(size, schedule, spent=probe_cost(problem))


def _iterations(
    problem: Problem, work: Work, targets: Tensor, teacher_id: int, saved: Checkpoint | None
) -> Iterator[tuple[int, Tensor]]:
    """Bring `work` to its end; yields as `run` does.

    Batch by batch in order of the images' ids. With early stop the last batch that was begun
    is brought past its stops and joins the one before, whose converged images have left.
    """
    while work.begun or work.following < len(targets):
        _join(problem, work)
        try:
            if _has_room(problem, work, len(targets)):
                _begin(problem, work, targets)
                _join(problem, work)
            state = work.begun[-1]
            for age, loss in run(problem, state):
                kept = state.kept.shape[1]
                work.spent[kept] = work.spent.get(kept, 0) + len(state.ids)
                yield age, loss
        except torch.OutOfMemoryError as error:
            _halve(problem, work, error)
            continue
        if _clear(problem, work, teacher_id) and saved is not None:
            saved.save(work)


def _has_room(problem: Problem, work: Work, images: int) -> bool:
    """Whether a batch should be begun: none is in work, or early stop has emptied enough of it."""
    if not work.begun or work.following == images:
        return not work.begun
    used = sum(len(state.ids) for state in work.begun)
    open_to_others = all(problem.is_open(state) for state in work.begun)
    return early_stop.rule(problem) is not None and open_to_others and used <= (1 - early_stop.CLEARING) * work.size


def _clear(problem: Problem, work: Work, teacher_id: int) -> bool:
    """Move the images that are done from the batch in hand to the finished ones; whether there were any."""
    state = work.begun[-1]
    leaving = early_stop.done(problem, state)
    if not bool(leaving.any()):
        return False
    work.finished.append(finish(problem, state.map(lambda rows: rows[leaving]), teacher_id))
    work.begun.pop()
    if not bool(leaving.all()):
        work.begun.append(state.map(lambda rows: rows[~leaving]))
    return True


def _join(problem: Problem, work: Work) -> None:
    """One batch of the last two, where both are past their stops and fit together."""
    if not early_stop.rule(problem) or len(work.begun) < 2:
        return
    pair = work.begun[-2:]
    if all(problem.is_open(state) for state in pair) and sum(len(state.ids) for state in pair) <= work.size:
        work.begun[-2:] = [State.joined(pair)]


def _begin(problem: Problem, work: Work, targets: Tensor) -> None:
    room = work.size - sum(len(state.ids) for state in work.begun)
    ids = torch.arange(work.following, min(work.following + room, len(targets)), device=targets.device)
    work.begun.append(start(problem, ids, targets[ids]))
    work.following += len(ids)


def _halve(problem: Problem, work: Work, error: torch.OutOfMemoryError) -> None:
    """Two batches of half the images in place of the one that did not fit; neither starts anew.

    With early stop that is the largest: the one in hand may be a few images that fill it up.

    Raises:
        torch.OutOfMemoryError: nothing can be halved.
    """
    sizes = [len(state.ids) for state in work.begun]
    size = (max(sizes) if early_stop.rule(problem) else sizes[-1]) if sizes else work.size
    if size == 1 or problem.config.couples:
        advice = "even for one image" if size == 1 else f"for {size} images that the prior couples; lower batch_size"
        raise torch.OutOfMemoryError(f"out of memory {advice} ({error})") from error
    work.size = -(-size // 2)
    log.warning("out of memory with %d images at once: going on with %d", size, work.size)
    if work.begun:
        place = len(sizes) - 1 - sizes[::-1].index(size)
        state = work.begun[place]
        halves = [state.map(lambda rows: rows[work.size :]), state.map(lambda rows: rows[: work.size])]
        work.begun[place : place + 1] = halves


def _batch_size(problem: Problem, targets: Tensor) -> int:
    size = problem.config.batch_size
    if isinstance(size, int):
        return size
    chosen = fitting_batch(problem, targets)
    log.info("batch size: %d images at once fit the free memory", chosen)
    return chosen


class _Reporter:
    """Turns the iterations of a batch into `InversionProgress` of the whole inversion."""

    def __init__(
        self, problem: Problem, work: Work, images: int, progress: Callable[[InversionProgress], None] | None
    ) -> None:
        self.problem, self.work, self.images, self.progress = problem, work, images, progress
        self.started = time.perf_counter()
        self.last: InversionProgress | None = None

    def at(self, age: int, loss: Tensor) -> None:
        """The batch in hand is of `age`."""
        if self.progress is None:
            return
        leaving, state = early_stop.rule(self.problem), self.work.begun[-1]
        finished = sum(len(part) for part in self.work.finished)
        if age == self.problem.config.iterations and not leaving:
            finished += len(state.ids) * (1 + state.snapshots.shape[1])
        done, total = _position(self.problem, self.work, self.images, age)
        if leaving and self.last is not None:
            done = max(done, self.last.done)  # images that join a batch are younger than those in it
        self.last = InversionProgress(
            done=done,
            total=total,
            images=finished,
            kept=state.kept.shape[1],
            patches=state.canvas.shape[1],
            spent=dict(self.work.spent),
            loss=loss,
            seconds=time.perf_counter() - self.started,
        )
        self.progress(self.last)

    def end(self) -> None:
        """With early stop nobody knows beforehand which iteration is the last."""
        if self.progress is not None and self.last is not None and early_stop.rule(self.problem) is not None:
            images = sum(len(part) for part in self.work.finished)
            self.progress(replace(self.last, done=self.last.total, images=images))


def _position(problem: Problem, work: Work, images: int, age: int) -> tuple[int, int]:
    """Iterations done and of all batches, where the batch in hand is of `age`."""
    iterations = problem.config.iterations
    if early_stop.rule(problem):
        going = sum(len(state.ids) for state in work.begun)
        total = -(-images // work.size) * iterations
        return round(total * ((work.following - going) * iterations + going * age) / (images * iterations)), total
    batches = len(work.finished) + len(work.begun) - (-(images - work.following) // work.size)
    return len(work.finished) * iterations + age, batches * iterations
