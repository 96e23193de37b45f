"""What a round is made of, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smi_fed.distillation import DistillationRecord
from smi_fed.inversion import SparseImages
from smi_fed.models import ModelSpec
from smi_fed.pipeline import InversionRecord, TrainedTeacher
from smi_fed.strategies.admission import Verdict
from smi_fed.strategies.records import Claim

Weights = dict[str, Tensor]


class TooFewTeachersError(RuntimeError):
    """Fewer teachers were admitted than the run needs; the message lists every refusal."""


@dataclass
class RoundRecord:
    """What one round did, for reports.

    Attributes:
        projections: weights in the student's space, one per teacher, as the inner strategy gets them.
        reused: images of earlier rounds that were distilled from again.
        refined: whether the student was distilled after aggregation.
    """

    round: int
    verdicts: list[Verdict] = field(default_factory=list)
    images: list[SparseImages] = field(default_factory=list)
    inversions: list[InversionRecord] = field(default_factory=list)
    distillation: DistillationRecord = field(default_factory=DistillationRecord)
    projections: list[Weights] = field(default_factory=list, repr=False)
    reused: int = 0
    refined: bool = False
    seconds: float = 0.0

    @property
    def teachers(self) -> list[TrainedTeacher]:
        """The admitted teachers, in the order of `images` and `inversions`."""
        return [verdict.teacher for verdict in self.verdicts if verdict.teacher is not None]


@dataclass(frozen=True)
class Answer:
    """What one node sent: a claim, or why there is none; and the reply itself, to be answered in its shape."""

    node: int
    claim: Claim | None = None
    failure: str = ""
    reply: Any = field(default=None, repr=False)


def common_metrics(verdicts: Sequence[Verdict]) -> list[dict[str, int | float]]:
    """Of each admitted verdict the metrics that all of them sent; a key of one client alone would stop aggregation."""
    admitted = [verdict for verdict in verdicts if verdict.admitted]
    shared = set.intersection(*(set(v.metrics) for v in admitted)) if admitted else set()
    return [{key: verdict.metrics[key] for key in sorted(shared)} for verdict in admitted]


def describe(spec: ModelSpec) -> str:
    """An architecture in a few words: its name and what its arguments change."""
    short = {
        "patch_size": "patch", "window_size": "window", "embed_dim": "width", "depth": "depth", "depths": "depths",
        "num_heads": "heads",
    }  # fmt: skip
    told = {key: spec.kwargs[key] for key in short if key in spec.kwargs}
    parts = [f"{short[key]} {'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in told.items()]
    return f"{spec.name} ({', '.join(parts)})" if parts else spec.name
