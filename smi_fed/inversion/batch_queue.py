"""The batches of an inversion, in turn: begun, halved where memory is short, joined where images have left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smi_fed.inversion.leaving import CLEARING, Tally
from smi_fed.inversion.loop import finish, run, start
from smi_fed.inversion.memory import fitting_batch
from smi_fed.inversion.problem import Problem
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import State
from smi_fed.sparse_images import SparseImages

log = logging.getLogger("smi_fed")


@dataclass
class BatchQueue:
    """What an inversion has done and what it is doing.

    Attributes:
        size: images of the next batch.
        schedule: when patches stop; the written one unless it was planned otherwise.
        finished: images, in order of their ids unless later ones were done first.
        begun: batches in work, the current one last; more than one after a batch was halved
            or while a new one is brought past its stops to join another.
        following: id of the first image that was not begun.
        spent: iterations of single images so far, by the number of patches they kept.
    """

    size: int
    schedule: StopSchedule
    finished: list[SparseImages] = field(default_factory=list)
    begun: list[State] = field(default_factory=list)
    following: int = 0
    spent: dict[int, int] = field(default_factory=dict)

    @property
    def images_begun(self) -> tuple[int, ...]:
        """Images of each batch in work."""
        return tuple(len(state.ids) for state in self.begun)

    def tally(self, problem: Problem, images: int, age: int) -> Tally:
        """Where it stands, of that many `images`, where the youngest of the batch in hand is of `age`."""
        finished, begun = len(self.finished), self.images_begun
        return Tally(problem.config.iterations, self.size, images, self.following, finished, begun, age)


def batch_size(problem: Problem, targets: Tensor) -> int:
    """Images of the first batch: the settings' number, or as many as fit."""
    size = problem.config.batch_size
    if isinstance(size, int):
        return size
    chosen = fitting_batch(problem, targets)
    log.info("batch size: %d images at once fit the free memory", chosen)
    return chosen


def iterations(
    problem: Problem, queue: BatchQueue, targets: Tensor, teacher_id: int, on_finished: Callable[[BatchQueue], None]
) -> Iterator[tuple[int, Tensor]]:
    """Bring `queue` to its end; yields as `run` does, and calls `on_finished` when images were finished.

    Batch by batch in order of the images' ids. Where images leave early, the last batch that
    was begun is brought past its stops and joins the one before, some of whose have left.
    """
    while queue.begun or queue.following < len(targets):
        _join(problem, queue)
        try:
            if _has_room(problem, queue, len(targets)):
                _begin(problem, queue, targets)
                _join(problem, queue)
            state = queue.begun[-1]
            for age, loss in run(problem, state):
                kept = state.kept.shape[1]
                queue.spent[kept] = queue.spent.get(kept, 0) + len(state.ids)
                yield age, loss
        except torch.OutOfMemoryError as error:
            _halve(problem, queue, error)
            continue
        if _clear(problem, queue, teacher_id):
            on_finished(queue)


def _has_room(problem: Problem, queue: BatchQueue, images: int) -> bool:
    """Whether a batch should be begun: none is in work, or so many images have left that others should join."""
    if not queue.begun or queue.following == images:
        return not queue.begun
    past_stops = all(problem.in_last_stage(state) for state in queue.begun)
    free = sum(queue.images_begun) <= (1 - CLEARING) * queue.size
    return problem.config.leaving.refills and past_stops and free


def _begin(problem: Problem, queue: BatchQueue, targets: Tensor) -> None:
    room = queue.size - sum(queue.images_begun)
    ids = torch.arange(queue.following, min(queue.following + room, len(targets)), device=targets.device)
    queue.begun.append(start(problem, ids, targets[ids]))
    queue.following += len(ids)


def _join(problem: Problem, queue: BatchQueue) -> None:
    """One batch of the last two, where both are past their stops and fit together."""
    pair = queue.begun[-2:]
    if len(pair) == 2 and all(map(problem.in_last_stage, pair)) and sum(queue.images_begun[-2:]) <= queue.size:
        queue.begun[-2:] = [State.joined(pair)]


def _clear(problem: Problem, queue: BatchQueue, teacher_id: int) -> bool:
    """Move the images that are done from the batch in hand to the finished ones; whether there were any."""
    state = queue.begun[-1]
    leaving = problem.done(state)
    if not bool(leaving.any()):
        return False
    queue.finished.append(finish(problem, state.map(lambda rows: rows[leaving]), teacher_id))
    queue.begun.pop()
    if not bool(leaving.all()):
        queue.begun.append(state.map(lambda rows: rows[~leaving]))
    return True


def _halve(problem: Problem, queue: BatchQueue, error: torch.OutOfMemoryError) -> None:
    """Two batches of half the images in place of the largest; neither starts anew.

    The one in hand may be a few images that fill the largest up.

    Raises:
        torch.OutOfMemoryError: nothing can be halved.
    """
    sizes = queue.images_begun
    size = max(sizes, default=queue.size)
    if size == 1 or problem.config.couples:
        advice = "even for one image" if size == 1 else f"for {size} images that the prior couples; lower batch_size"
        raise torch.OutOfMemoryError(f"out of memory {advice} ({error})") from error
    queue.size = -(-size // 2)
    log.warning("out of memory with %d images at once: going on with %d", size, queue.size)
    if sizes:
        place = len(sizes) - 1 - sizes[::-1].index(size)
        state = queue.begun[place]
        halves = [state.map(lambda rows: rows[queue.size :]), state.map(lambda rows: rows[: queue.size])]
        queue.begun[place : place + 1] = halves
