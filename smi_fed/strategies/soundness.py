"""Whether an aggregated student can be used: it is checked as a teacher is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smi_fed.inversion.batch_norm import nonnegative_keys
from smi_fed.models import Classifier
from smi_fed.strategies.admission import check_output
from smi_fed.strategies.records import BadReplyError
from smi_fed.strategies.round_record import UnsoundStudentError, Weights


def require_sound(student: Classifier, after: str) -> None:
    """Refuse a student that is not finite.

    Args:
        after: what was done to it, for the message.

    Raises:
        UnsoundStudentError: naming the first tensor that is not finite, or its logits.
    """
    broken = [key for key, value in student.state_dict().items() if not bool(value.isfinite().all())]
    try:
        if broken:
            raise BadReplyError(f"{broken[0]} is not finite")
        check_output(student)
    except BadReplyError as error:
        raise UnsoundStudentError(f"after {after} the student cannot be used: {error}") from error


def with_sound_statistics(
    aggregated: Mapping[str, Tensor], projections: Sequence[Weights], student: Classifier
) -> Weights:
    """`aggregated`, with BatchNorm's variances and counts as they can be.

    Strategies step all numbers alike, and momentum or an adaptive step can carry a variance below
    0, where every logit is NaN. Such a value is instead the mean of what was aggregated.

    Args:
        projections: what was aggregated.
    """
    sound = dict(aggregated)
    for key in nonnegative_keys(student):
        negative = ~(sound[key] >= 0)  # NaN too
        if bool(negative.any()):
            mean = sum((each[key].double() for each in projections), torch.zeros(())) / len(projections)
            sound[key] = torch.where(negative, mean.to(sound[key].dtype), sound[key])
    return sound
