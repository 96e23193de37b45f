"""Sparse model inversion (Hu et al., ICML 2024, arXiv 2510.27186).

One loop for dense and sparse: dense is an empty schedule. Deviations from the paper's
public code, each because the code departs from the paper or couples images of a batch:
the kept set is the one that was optimised, stopped patches do not move, total variation
is per image and over kept patches, jitter is patch-exact once patches have stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from smi_fed.inversion import losses
from smi_fed.inversion.acceleration import uncompiled
from smi_fed.inversion.augment import clean_view, random_view
from smi_fed.inversion.batch_norm import batch_norm_prior
from smi_fed.inversion.losses import Neighbours
from smi_fed.inversion.optimiser import adam_step
from smi_fed.inversion.problem import Problem
from smi_fed.inversion.selections import SELECTIONS, Candidates
from smi_fed.inversion.state import State, Tensors
from smi_fed.inversion.teacher import View
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import put, take, to_images


def start(problem: Problem, ids: Tensor, targets: Tensor) -> State:
    """A batch before its first iteration."""
    teacher = problem.teacher
    patches = teacher.grid[0] * teacher.grid[1]
    parameters = problem.parametrisation.start(problem.key, ids)
    if problem.warm is not None:
        _warm_up(problem, problem.warm, ids, parameters)
    problem.parametrisation.project(parameters)
    kept = torch.arange(patches, device=ids.device).repeat(len(ids), 1)
    canvas = problem.parametrisation.patches(parameters, kept).clone()
    state = State(
        ids=ids,
        targets=targets,
        age=torch.zeros_like(ids),
        kept=kept,
        canvas=canvas,
        stopped_at=torch.full_like(kept, -1),
        parameters=parameters,
        first={name: torch.zeros_like(each) for name, each in parameters.items()},
        second={name: torch.zeros_like(each) for name, each in parameters.items()},
    )
    problem.config.stopping.start(state)
    problem.config.leaving.start(state)
    return state


def _warm_up(problem: Problem, warm: SparseImages, ids: Tensor, parameters: Tensors) -> None:
    """Put the images that `warm` has for some of `ids` in place of their noise."""
    places = {int(each): row for row, each in enumerate(warm.ids)}
    pairs = [(place, places[each]) for place, each in enumerate(ids.tolist()) if each in places]
    if pairs:
        rows, sources = (torch.tensor(each, device=ids.device) for each in zip(*pairs, strict=True))
        encoded = problem.parametrisation.encode(warm.images[sources.cpu()].to(ids.device))
        for name, parameter in parameters.items():
            parameter[rows] = encoded[name].to(parameter)


def run(problem: Problem, state: State) -> Iterator[tuple[int, Tensor]]:
    """Iterate `state`, in place; yields (age of its youngest image, mean loss) after each iteration.

    To the end; where others take the places of images that are done, only until these may
    join, right after the last stop, and from then on until so many are done that they should.
    """
    config = problem.config
    stops = dict(config.schedule.kept_counts(state.canvas.shape[1]))
    touching = losses.neighbours(state.kept, problem.teacher.grid)
    first, oldest = (int(age) for age in state.age.aminmax())
    for iteration in range(first, first + config.iterations - oldest):
        if stops.get(iteration, state.kept.shape[1]) < state.kept.shape[1]:
            stop_patches(problem, state, stops[iteration])
            if config.leaving.refills and problem.in_last_stage(state):
                return
            touching = losses.neighbours(state.kept, problem.teacher.grid)
        elif problem.in_last_stage(state) and config.leaving.makes_room(state, iteration):
            return
        yield iteration + 1, step(problem, state, touching)


def stop_patches(problem: Problem, state: State, count: int) -> None:
    """Only `count` patches of each image go on, the best by default; the others keep their pixels (section 3.2)."""
    rule = problem.config.stopping
    with torch.no_grad():
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        state.canvas = put(state.canvas, state.kept, patches)
    remaining = rule.going_on(scores(problem, state, patches), count)  # may run out of memory, so before any change
    rule.emit(state, whole(problem, state))
    going_on = take(state.kept, remaining)
    stopped = torch.ones_like(state.canvas[:, :, 0, 0, 0], dtype=torch.bool).scatter(1, going_on, value=False)
    newly = stopped & (state.stopped_at < 0)
    state.stopped_at = state.age[:, None].expand_as(newly).where(newly, state.stopped_at)
    drop = problem.parametrisation.drop
    state.parameters, state.first, state.second = (
        drop(each, remaining) for each in (state.parameters, state.first, state.second)
    )
    state.kept = going_on
    problem.config.leaving.start(state)


def scores(problem: Problem, state: State, patches: Tensor) -> Tensor:
    """What the selection says of `patches`, those that are in work (b, k)."""

    def pull() -> Tensor:
        shown = patches.detach().requires_grad_()
        touching = losses.neighbours(state.kept, problem.teacher.grid)
        with torch.enable_grad():
            seen = clean_view(shown, state.kept, state.canvas, problem.teacher)
            loss = view_loss(problem, state, seen, shown, touching)
            (gradient,) = torch.autograd.grad(loss.sum() * problem.loss_scale, shown)
        return gradient.abs().sum((2, 3, 4))

    view = clean_view(patches, state.kept, state.canvas, problem.teacher)
    candidates = Candidates(problem.teacher, view, state.targets, problem.key, state.ids, state.age, pull)
    with problem.autocast(), uncompiled(problem.config):
        return SELECTIONS[problem.config.selection](candidates)


def scores_by(problem: Problem, state: State, selection: str) -> Tensor:
    """Scores (b, k) of the patches in work by the selection of that name, whatever the settings have."""
    with torch.no_grad():
        patches = problem.parametrisation.patches(state.parameters, state.kept)
    return scores(replace(problem, config=replace(problem.config, selection=selection)), state, patches)


def step(problem: Problem, state: State, touching: Neighbours) -> Tensor:
    """One iteration, in place: view, loss, gradient, Adam, projection. Returns the mean loss.

    Running out of memory in a forward or backward leaves the state as it was.
    """
    for parameter in state.parameters.values():
        parameter.requires_grad_().grad = None
    try:
        loss = objective(problem, state, touching)
        # A sum, not a mean: an image's gradient must not shrink with the size of its batch.
        (loss.sum() * problem.loss_scale).backward()
    finally:
        for parameter in state.parameters.values():
            parameter.requires_grad_(False)
    if problem.loss_scale != 1:
        for parameter in state.parameters.values():
            assert parameter.grad is not None
            parameter.grad /= problem.loss_scale
    still = problem.done(state)
    adam_step(state, problem.config, still)
    for parameter in state.parameters.values():
        parameter.grad = None
    problem.parametrisation.project(state.parameters)
    state.age += 1
    problem.config.leaving.note(state, loss.detach(), still)
    return loss.detach().mean()


def objective(problem: Problem, state: State, touching: Neighbours) -> Tensor:
    """What each image is optimised for (b,): classification, total variation, feature priors (equation 1)."""
    config, teacher = problem.config, problem.teacher
    patches = problem.parametrisation.patches(state.parameters, state.kept)
    view = random_view(patches, state.kept, state.canvas, teacher, config, problem.key, state.ids, state.age)
    return view_loss(problem, state, view, patches, touching)


def view_loss(problem: Problem, state: State, view: View, patches: Tensor, touching: Neighbours) -> Tensor:
    """The objective (b,) of `patches` (b, k, c, ph, pw) that the teacher sees as `view`."""
    config, teacher, dtype = problem.config, problem.teacher, view.patches.dtype
    with problem.autocast(), problem.listening() as seen:
        logits, layers = (teacher.logits(view), []) if problem.statistics is None else teacher.features(view)
    loss = losses.classification(logits, state.targets)
    if config.tv:
        loss = loss + config.tv * losses.total_variation(patches, touching)
    if problem.statistics is not None:
        layers = [layer.to(dtype) for layer in layers]
        loss = loss + config.statistics * losses.statistics_prior(layers, view.positions, teacher, problem.statistics)
    if config.batchnorm:
        loss = loss + config.batchnorm * batch_norm_prior(seen).to(dtype)
    return loss


class DivergedError(FloatingPointError):
    """The teacher's gradients overflowed: the images are not finite."""


@torch.no_grad()
def whole(problem: Problem, state: State) -> Tensor:
    """Normalised pixels (b, n, c, ph, pw) of all patches as they stand."""
    if problem.config.background == "rendered":
        every = torch.arange(state.canvas.shape[1], device=state.kept.device).repeat(len(state.kept), 1)
        return problem.parametrisation.patches(state.parameters, every)
    return put(state.canvas, state.kept, problem.parametrisation.patches(state.parameters, state.kept))


@torch.no_grad()
def finish(problem: Problem, state: State, teacher_id: int = 0) -> SparseImages:
    """The images of a state as it stands; of one trajectory in a row.

    Raises:
        DivergedError: they are not finite.
    """
    teacher = problem.teacher
    canvas, stopped_at = problem.config.stopping.finished(state, whole(problem, state))
    images = canvas.shape[1]  # of each trajectory
    pixels = (to_images(canvas.flatten(0, 1), teacher.grid) * teacher.std + teacher.mean).clamp(0, 1).float()
    if not bool(pixels.isfinite().all()):
        raise DivergedError("inversion diverged: the images are not finite, since the model's gradients overflow")
    stopped_at = stopped_at.reshape(-1, *teacher.grid).cpu()
    ids = state.ids.repeat_interleave(images).cpu()
    return SparseImages(
        images=pixels.cpu(),
        mask=stopped_at < 0,
        targets=state.targets.repeat_interleave(images, 0).cpu(),
        patch_size=teacher.patch_size,
        ids=ids,
        teachers=torch.full_like(ids, teacher_id),
        stopped_at=stopped_at,
    )
