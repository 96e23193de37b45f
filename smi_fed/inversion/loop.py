"""Sparse model inversion (Hu et al., ICML 2024, arXiv 2510.27186).

One loop for dense and sparse: dense is an empty schedule. Deviations from the paper's
public code, each because the code departs from the paper or couples images of a batch:
the kept set is the one that was optimised, stopped patches do not move, total variation
is per image and over kept patches, jitter is patch-exact once patches have stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi_fed.inversion import losses, randomness
from smi_fed.inversion.augment import clean_view, random_view
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.inputs import check_prior, check_targets
from smi_fed.inversion.losses import FeatureStatistics, Neighbours
from smi_fed.inversion.optimiser import Moments, adam_step
from smi_fed.inversion.parametrisation import FreePixels, Parameters, Parametrisation, Pyramid
from smi_fed.inversion.selection import SELECTIONS, best
from smi_fed.inversion.teacher import Teacher, adapt, frozen
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import put, take, to_images


@dataclass(frozen=True)
class InversionProgress:
    """Where an inversion stands; handed to the caller after every iteration.

    Attributes:
        done, total: iterations over all batches.
        images: images finished so far.
        kept, patches: patches in work and of the whole grid.
        loss: mean loss of the batch, a tensor so that nobody waits for the device unless
            the number is read.
        seconds: since the start.
    """

    done: int
    total: int
    images: int
    kept: int
    patches: int
    loss: Tensor
    seconds: float


@dataclass
class State:
    """All there is to know of a batch in work; the loop keeps nothing anywhere else.

    The images of a state keep the same number k of patches. Tensors, images first: ids (b,),
    targets (b,) or (b, classes), age (b,) in iterations, kept (b, k) ascending,
    canvas (b, n, c, ph, pw) normalised pixels of stopped patches, stopped_at (b, n).
    """

    ids: Tensor
    targets: Tensor
    age: Tensor
    parameters: Parameters
    moments: Moments
    kept: Tensor
    canvas: Tensor
    stopped_at: Tensor


@dataclass(frozen=True)
class Problem:
    """What is inverted and how: all that stays the same through the loop."""

    teacher: Teacher
    parametrisation: Parametrisation
    config: InversionConfig
    key: int
    statistics: FeatureStatistics | None


def invert(
    model: nn.Module,
    targets: Tensor,
    config: InversionConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    statistics: FeatureStatistics | None = None,
    teacher_id: int = 0,
    progress: Callable[[InversionProgress], None] | None = None,
) -> SparseImages:
    """Synthesise one image per target from what `model` has learnt.

    Args:
        model: a `smi_fed.models.Classifier` or a plain timm model, on the device to work on.
            Its weights, mode, hooks and gradient flags are as before afterwards, whatever
            happens inside.
        targets: (b,) integer class indices, or (b, classes) floats in [0, 1] for
            multi-label models.
        config: settings; None is the paper's.
        generator: one integer is drawn from it. Every choice is a function of that
            integer, the image's id (its place in `targets`) and the iteration.
        statistics: what the feature-statistics prior compares with. The prior couples the
            images of a batch: with it `batch_size` is part of the result's identity.
        teacher_id: stored with the images.
        progress: called after every iteration.

    Returns:
        The images of the last iterate, on the CPU.

    Raises:
        ValueError: targets, statistics or settings that do not fit the model; before any work.
    """
    config = config or InversionConfig.paper()
    teacher = adapt(model, config.patch_size)
    targets = check_targets(targets, teacher.classes).to(teacher.mean.device)
    check_prior(teacher, config, statistics)
    known = statistics.to(teacher.mean) if statistics is not None and config.statistics > 0 else None
    problem = Problem(teacher, parametrise(teacher, config), config, randomness.draw_key(generator), known)
    ids = torch.arange(len(targets), device=targets.device)
    report = _reporter(problem, len(targets), progress)
    found = []
    with frozen(model), torch.enable_grad():
        for batch_ids, batch_targets in zip(
            ids.split(config.batch_size), targets.split(config.batch_size), strict=True
        ):
            state = start(problem, batch_ids, batch_targets)
            for loss in run(problem, state):
                report(state, loss)
            found.append(finish(problem, state, teacher_id))
    return SparseImages.concat(found)


def start(problem: Problem, ids: Tensor, targets: Tensor) -> State:
    """A batch before its first iteration."""
    teacher = problem.teacher
    patches = teacher.grid[0] * teacher.grid[1]
    parameters = problem.parametrisation.start(problem.key, ids)
    problem.parametrisation.project(parameters)
    kept = torch.arange(patches, device=ids.device).repeat(len(ids), 1)
    return State(
        ids=ids,
        targets=targets,
        age=torch.zeros_like(ids),
        parameters=parameters,
        moments=Moments.zeros(parameters),
        kept=kept,
        canvas=problem.parametrisation.patches(parameters, kept).clone(),
        stopped_at=torch.full_like(kept, -1),
    )


def run(problem: Problem, state: State) -> Iterator[Tensor]:
    """Iterate `state`, in place, to the end; yields the mean loss after each iteration."""
    config = problem.config
    stops = dict(config.schedule.kept_counts(state.canvas.shape[1]))
    touching = losses.neighbours(state.kept, problem.teacher.grid)
    for iteration in range(int(state.age.min()), config.iterations):
        if stops.get(iteration, state.kept.shape[1]) < state.kept.shape[1]:
            stop_patches(problem, state, stops[iteration])
            touching = losses.neighbours(state.kept, problem.teacher.grid)
        yield step(problem, state, touching)


def stop_patches(problem: Problem, state: State, count: int) -> None:
    """Only the `count` best patches of each image go on; the others keep their pixels (section 3.2)."""
    with torch.no_grad():
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        state.canvas = put(state.canvas, state.kept, patches)
    view = clean_view(patches, state.kept, state.canvas, problem.teacher)
    select = SELECTIONS[problem.config.selection]
    scores = select(problem.teacher, view, state.targets, problem.key, state.ids, state.age)
    remaining = best(scores, count)
    going_on = take(state.kept, remaining)
    stopped = torch.ones_like(state.canvas[:, :, 0, 0, 0], dtype=torch.bool).scatter(1, going_on, value=False)
    newly = stopped & (state.stopped_at < 0)
    state.stopped_at = state.age[:, None].expand_as(newly).where(newly, state.stopped_at)
    drop = problem.parametrisation.drop
    state.parameters = drop(state.parameters, remaining)
    state.moments = Moments(drop(state.moments.first, remaining), drop(state.moments.second, remaining))
    state.kept = going_on


def step(problem: Problem, state: State, touching: Neighbours) -> Tensor:
    """One iteration, in place: view, loss, gradient, Adam, projection. Returns the mean loss."""
    config, teacher = problem.config, problem.teacher
    for parameter in state.parameters.values():
        parameter.requires_grad_().grad = None
    patches = problem.parametrisation.patches(state.parameters, state.kept)
    view = random_view(patches, state.kept, state.canvas, teacher, config, problem.key, state.ids, state.age)
    half = config.precision == "bfloat16"
    with torch.autocast(teacher.mean.device.type, torch.bfloat16) if half else nullcontext():
        if problem.statistics is None:
            logits, layers = teacher.logits(view), []
        else:
            logits, layers = teacher.features(view)
    loss = losses.classification(logits.to(patches.dtype), state.targets)
    if config.tv:
        loss = loss + config.tv * losses.total_variation(patches, touching)
    if problem.statistics is not None:
        layers = [layer.to(patches.dtype) for layer in layers]
        loss = loss + config.statistics * losses.statistics_prior(layers, view.positions, teacher, problem.statistics)
    # A sum, not a mean: an image's gradient must not shrink with the size of its batch.
    loss.sum().backward()
    adam_step(state.parameters, state.moments, state.age, config)
    with torch.no_grad():
        for parameter in state.parameters.values():
            parameter.requires_grad_(False).grad = None
        problem.parametrisation.project(state.parameters)
    state.age += 1
    return loss.detach().mean()


@torch.no_grad()
def finish(problem: Problem, state: State, teacher_id: int = 0) -> SparseImages:
    """The images of a state as it stands."""
    teacher = problem.teacher
    if problem.config.background == "rendered":
        every = torch.arange(state.canvas.shape[1], device=state.kept.device).repeat(len(state.kept), 1)
        canvas = problem.parametrisation.patches(state.parameters, every)
    else:
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        canvas = put(state.canvas, state.kept, patches)
    pixels = (to_images(canvas, teacher.grid) * teacher.std + teacher.mean).clamp(0, 1).float()
    stopped_at = state.stopped_at.view(-1, *teacher.grid).cpu()
    return SparseImages(
        images=pixels.cpu(),
        mask=stopped_at < 0,
        targets=state.targets.cpu(),
        patch_size=teacher.patch_size,
        ids=state.ids.cpu(),
        teachers=torch.full_like(state.ids, teacher_id).cpu(),
        stopped_at=stopped_at,
    )


def parametrise(teacher: Teacher, config: InversionConfig) -> Parametrisation:
    """The parametrisation that `config` names."""
    if config.parametrisation == "pixels":
        return FreePixels(teacher)
    return Pyramid(teacher, config.levels, config.start_scale)


def _reporter(
    problem: Problem, images: int, progress: Callable[[InversionProgress], None] | None
) -> Callable[[State, Tensor], None]:
    """Turns a batch's iterations into `InversionProgress` of the whole inversion."""
    size, iterations = problem.config.batch_size, problem.config.iterations
    total = iterations * -(-images // size)
    started = time.perf_counter()
    done = 0

    def report(state: State, loss: Tensor) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            finished = min(images, done // iterations * size)
            kept, patches = state.kept.shape[1], state.canvas.shape[1]
            progress(InversionProgress(done, total, finished, kept, patches, loss, time.perf_counter() - started))

    return report
