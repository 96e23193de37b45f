"""Sparse model inversion (Hu et al., ICML 2024, arXiv 2510.27186).

One loop for dense and sparse: dense is an empty schedule. Deviations from the paper's
public code, each because the code departs from the paper or couples images of a batch:
the kept set is the one that was optimised, stopped patches do not move, total variation
is per image and over kept patches, jitter is patch-exact once patches have stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smi_fed.inversion import losses
from smi_fed.inversion.acceleration import uncompiled
from smi_fed.inversion.augment import clean_view, random_view
from smi_fed.inversion.batch_norm import Seen, batch_norm_prior, input_statistics
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.losses import FeatureStatistics, Neighbours
from smi_fed.inversion.optimiser import Moments, adam_step
from smi_fed.inversion.parametrisation import FreePixels, Parameters, Parametrisation, Pyramid
from smi_fed.inversion.selection import SELECTIONS, best
from smi_fed.inversion.teacher import Teacher
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import put, take, to_images


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

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The state with `change` made to every tensor, such as some of the rows or another device."""
        return State.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file; undone by `from_tensors`."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("parameters", "moments")}
        groups = {"parameters": self.parameters, "first": self.moments.first, "second": self.moments.second}
        return named | {f"{group}.{name}": t for group, own in groups.items() for name, t in own.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """A state from what `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
        """

        def group(prefix: str) -> Parameters:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        moments = Moments(group("first."), group("second."))
        plain = {f.name: tensors[f.name] for f in fields(cls) if f.name not in ("parameters", "moments")}
        return cls(parameters=group("parameters."), moments=moments, **plain)


@dataclass(frozen=True)
class Problem:
    """What is inverted and how: all that stays the same through the loop."""

    teacher: Teacher
    parametrisation: Parametrisation
    config: InversionConfig
    key: int
    statistics: FeatureStatistics | None
    warm: SparseImages | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """Where the teacher computes: in bfloat16 if the settings say so; pixels keep their dtype."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.teacher.mean.device.type, torch.bfloat16)

    @contextmanager
    def listening(self) -> Iterator[list[Seen]]:
        """Where the BatchNorm layers tell what they are shown, if the settings have that prior."""
        if not self.config.batchnorm:
            yield []
            return
        with uncompiled(self.config), input_statistics(self.teacher.backbone) as seen:
            yield seen


def start(problem: Problem, ids: Tensor, targets: Tensor) -> State:
    """A batch before its first iteration."""
    teacher = problem.teacher
    patches = teacher.grid[0] * teacher.grid[1]
    parameters = problem.parametrisation.start(problem.key, ids)
    if problem.warm is not None:
        _warm_up(problem, problem.warm, ids, parameters)
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


def _warm_up(problem: Problem, warm: SparseImages, ids: Tensor, parameters: Parameters) -> None:
    """Put the images that `warm` has for some of `ids` in place of their noise."""
    places = {int(each): row for row, each in enumerate(warm.ids)}
    pairs = [(place, places[each]) for place, each in enumerate(ids.tolist()) if each in places]
    if pairs:
        rows, sources = (torch.tensor(each, device=ids.device) for each in zip(*pairs, strict=True))
        encoded = problem.parametrisation.encode(warm.images[sources.cpu()].to(ids.device))
        for name, parameter in parameters.items():
            parameter[rows] = encoded[name].to(parameter)


def run(problem: Problem, state: State) -> Iterator[tuple[int, Tensor]]:
    """Iterate `state`, in place, to the end; yields (iterations done, mean loss) after each one."""
    config = problem.config
    stops = dict(config.schedule.kept_counts(state.canvas.shape[1]))
    touching = losses.neighbours(state.kept, problem.teacher.grid)
    for iteration in range(int(state.age.min()), config.iterations):
        if stops.get(iteration, state.kept.shape[1]) < state.kept.shape[1]:
            stop_patches(problem, state, stops[iteration])
            touching = losses.neighbours(state.kept, problem.teacher.grid)
        yield iteration + 1, step(problem, state, touching)


def stop_patches(problem: Problem, state: State, count: int) -> None:
    """Only the `count` best patches of each image go on; the others keep their pixels (section 3.2)."""
    with torch.no_grad():
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        state.canvas = put(state.canvas, state.kept, patches)
    view = clean_view(patches, state.kept, state.canvas, problem.teacher)
    select = SELECTIONS[problem.config.selection]
    with problem.autocast(), uncompiled(problem.config):
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
    """One iteration, in place: view, loss, gradient, Adam, projection. Returns the mean loss.

    Running out of memory in a forward or backward leaves the state as it was.
    """
    for parameter in state.parameters.values():
        parameter.requires_grad_().grad = None
    try:
        loss = objective(problem, state, touching)
        # A sum, not a mean: an image's gradient must not shrink with the size of its batch.
        loss.sum().backward()
    finally:
        for parameter in state.parameters.values():
            parameter.requires_grad_(False)
    adam_step(state.parameters, state.moments, state.age, problem.config)
    for parameter in state.parameters.values():
        parameter.grad = None
    problem.parametrisation.project(state.parameters)
    state.age += 1
    return loss.detach().mean()


def objective(problem: Problem, state: State, touching: Neighbours) -> Tensor:
    """What each image is optimised for (b,): classification, total variation, feature priors (equation 1)."""
    config, teacher = problem.config, problem.teacher
    patches = problem.parametrisation.patches(state.parameters, state.kept)
    view = random_view(patches, state.kept, state.canvas, teacher, config, problem.key, state.ids, state.age)
    with problem.autocast(), problem.listening() as seen:
        logits, layers = (teacher.logits(view), []) if problem.statistics is None else teacher.features(view)
    loss = losses.classification(logits.to(patches.dtype), state.targets)
    if config.tv:
        loss = loss + config.tv * losses.total_variation(patches, touching)
    if problem.statistics is not None:
        layers = [layer.to(patches.dtype) for layer in layers]
        loss = loss + config.statistics * losses.statistics_prior(layers, view.positions, teacher, problem.statistics)
    if config.batchnorm:
        loss = loss + config.batchnorm * batch_norm_prior(seen).to(patches.dtype)
    return loss


class DivergedError(FloatingPointError):
    """The teacher's gradients overflowed: the images are not finite."""


@torch.no_grad()
def finish(problem: Problem, state: State, teacher_id: int = 0) -> SparseImages:
    """The images of a state as it stands.

    Raises:
        DivergedError: they are not finite.
    """
    teacher = problem.teacher
    if problem.config.background == "rendered":
        every = torch.arange(state.canvas.shape[1], device=state.kept.device).repeat(len(state.kept), 1)
        canvas = problem.parametrisation.patches(state.parameters, every)
    else:
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        canvas = put(state.canvas, state.kept, patches)
    pixels = (to_images(canvas, teacher.grid) * teacher.std + teacher.mean).clamp(0, 1).float()
    if not bool(pixels.isfinite().all()):
        raise DivergedError("inversion diverged: the images are not finite, since the model's gradients overflow")
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
