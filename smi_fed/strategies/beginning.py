"""The student's start out of what clients sent in round 1: their average, or the head of their class statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from smi_fed.alignment import interchangeable
from smi_fed.class_statistics import capped, discriminant, merged, put_head
from smi_fed.models import Classifier
from smi_fed.strategies.round_record import describe
from smi_fed.teachers import TrainedTeacher

log = logging.getLogger("smi_fed")


class NoStartError(RuntimeError):
    """No admitted reply has what the student shall start from; the message says what is missing."""


def begin_from(start: str, student: Classifier, teachers: Iterable[TrainedTeacher]) -> None:
    """Give `student`, in place, the start that `start` names: average | statistics.

    Args:
        teachers: all admitted ones; each is asked for once, and none is held.

    Raises:
        NoStartError: none has what it takes.
    """
    (_average if start == "average" else _put_discriminant)(student, teachers)


def averages(teacher: TrainedTeacher, student: Classifier) -> bool:
    """Whether the teacher's weights can be averaged with the student's."""
    every = tuple(range(student.spec.num_classes))
    return teacher.classes in (None, every) and interchangeable(teacher.model, student)


def _average(student: Classifier, teachers: Iterable[TrainedTeacher]) -> None:
    """The mean of the models of the student's architecture, by their examples (FedAvg, McMahan et al., 2017)."""
    own = student.state_dict()
    total, examples, count = {key: torch.zeros_like(w, dtype=torch.float64) for key, w in own.items()}, 0, 0
    for teacher in teachers:
        if averages(teacher, student):
            count, examples = count + 1, examples + teacher.num_examples
            for key, weight in teacher.model.state_dict().items():
                total[key] += teacher.num_examples * weight.to(total[key])
    if not count:
        raise NoStartError(f"start: average needs a client of the student's architecture, {describe(student.spec)}")
    student.load_state_dict({key: _like(weight / examples, own[key]) for key, weight in total.items()})
    log.info("the student starts from the average of %d models of its architecture", count)


def _like(mean: Tensor, weight: Tensor) -> Tensor:
    """A mean in the weight's own type; BatchNorm counts its batches in whole numbers."""
    return (mean if weight.is_floating_point() else mean.round()).to(weight.dtype)


def _put_discriminant(student: Classifier, teachers: Iterable[TrainedTeacher]) -> None:
    """The linear discriminant of all clients' class statistics as the student's head."""
    parts = [capped(t.class_statistics, t.num_examples) for t in teachers if t.class_statistics is not None]
    known = merged(parts) if parts else None
    if known is None or not known.counts.sum():
        raise NoStartError(
            "start: statistics needs a client with at least client.minimum_examples images of one class; none was sent"
        )
    put_head(student, discriminant(known))
    log.info("the student's head is the discriminant of %d clients' class statistics", len(parts))
    if missing := (known.counts == 0).nonzero()[:, 0].tolist():
        log.warning("no client sent statistics of the classes %s: the student's start never names them", missing)
