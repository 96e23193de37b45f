"""`invert`: batches through the loop, with progress, checkpoints and room for what does not fit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from smi_fed.checks import require
from smi_fed.inversion import randomness
from smi_fed.inversion.acceleration import accelerated
from smi_fed.inversion.batch_queue import BatchQueue, batch_size, iterations
from smi_fed.inversion.checkpoint import Checkpoint, identity_of, stored_key
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.inputs import check_prior, check_targets, check_warm
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.probe import probe
from smi_fed.inversion.problem import Problem, pose
from smi_fed.inversion.teacher import adapt, frozen
from smi_fed.sparse_images import SparseImages
from smi_fed.wrappers import unwrapped


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
    loss: Tensor | float
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
    key = None if checkpoint is None or generator is not None else stored_key(checkpoint)
    key = randomness.draw_key(generator) if key is None else key
    problem, saved = pose(model, config, key, statistics, warm), None
    if checkpoint is not None:
        identity = identity_of(model, targets, config, key, statistics, warm, teacher_id)
        saved = Checkpoint(checkpoint, identity, checkpoint_interval)
    with frozen(model), accelerated(model, config), torch.enable_grad():
        queue = (saved and saved.load(targets)) or _planned(problem, targets)
        problem = problem.under(queue.schedule)
        reporter = _Reporter(problem, queue, len(targets), progress)
        on_finished = saved.save if saved is not None else lambda _: None
        for age, loss in iterations(problem, queue, targets, teacher_id, on_finished):
            reporter.at(age, loss)
            if saved is not None:
                saved.save_if_due(queue)
        reporter.end()
    found = SparseImages.concat(queue.finished)
    in_order = bool((found.ids.diff() >= 0).all())  # then they need no copy of all pixels
    return found if in_order else found.select(found.ids.argsort(stable=True))


def trajectories(model: nn.Module, config: InversionConfig, images: int) -> int:
    """How many targets give at least `images` finished images of `model`, at least 1 of each.

    Raises:
        ValueError: the model or its patch size cannot be, see `adapt`.
    """
    rows, columns = adapt(model, config.patch_size).grid
    return -(-images // config.images_per_target(rows * columns))


def _planned(problem: Problem, targets: Tensor) -> BatchQueue:
    """Nothing done yet, under the schedule that is planned for this teacher."""
    size = batch_size(problem, targets)
    config, (rows, columns) = problem.config, problem.teacher.grid
    looks = partial(probe, problem, multi_label=targets.ndim == 2)
    plan = config.planning.plan(config.schedule, rows * columns, looks)
    return BatchQueue(size, plan.schedule, spent=dict(plan.spent))


class _Reporter:
    """Turns the iterations of a batch into `InversionProgress` of the whole inversion."""

    def __init__(
        self, problem: Problem, queue: BatchQueue, images: int, progress: Callable[[InversionProgress], None] | None
    ) -> None:
        self.problem, self.queue, self.images, self.progress = problem, queue, images, progress
        self.started = time.perf_counter()
        self.last: InversionProgress | None = None

    def at(self, age: int, loss: Tensor) -> None:
        """The youngest image of the batch in hand is of `age`."""
        if self.progress is None:
            return
        config, state = self.problem.config, self.queue.begun[-1]
        patches = state.canvas.shape[1]
        finished = sum(len(part) for part in self.queue.finished)
        if age == config.iterations:
            finished += len(state.ids) * config.images_per_target(patches)
        done, total = config.leaving.position(self.queue.tally(self.problem, self.images, age))
        if self.last is not None:
            done = max(done, self.last.done)  # images that join a batch are younger than those in it
        self.last = InversionProgress(
            done=done,
            total=total,
            images=finished,
            kept=state.kept.shape[1],
            patches=patches,
            spent=dict(self.queue.spent),
            loss=loss,
            seconds=time.perf_counter() - self.started,
        )
        self.progress(self.last)

    def end(self) -> None:
        """Where images leave early nobody knows beforehand which iteration is the last."""
        if self.progress is not None and self.last is not None and self.last.done < self.last.total:
            images = sum(len(part) for part in self.queue.finished)
            self.progress(replace(self.last, done=self.last.total, images=images))
