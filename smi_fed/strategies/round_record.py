"""What a round is made of, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smi_fed.distillation import DistillationRecord, Opinion
from smi_fed.lazy import Lazily
from smi_fed.models import ModelSpec
from smi_fed.pipeline import InversionRecord
from smi_fed.sparse_images import SparseImages, StoredImages
from smi_fed.strategies.records import Claim
from smi_fed.teachers import StoredTeacher

Weights = dict[str, Tensor]


class TooFewTeachersError(RuntimeError):
    """Fewer teachers were admitted than the run needs; the message lists every refusal."""


class UnsoundStudentError(FloatingPointError):
    """A student whose weights or answers are not finite; it is not written and not sent."""


@dataclass(frozen=True)
class Verdict:
    """What became of one node in a round: of its reply, and of what was made of it.

    Attributes:
        reason: why it is no teacher; empty where it is one.
        name: of the client, no other's in the run; empty as long as it is not known.
        teacher: its model, on disk.
        images: its synthetic images; None until it was inverted.
        inversion: what they took.
        opinion: what the other teachers' images say of it, where `distillation.robust` asks for agreement.
        reply: what the node sent, without its arrays.
        sent, received: bytes of the question and of the reply, see `records.size_of`; 0 in Flower's older API.
        age: how many rounds ago the node was asked.
    """

    node: int
    architecture: str = ""
    num_examples: int = 0
    train_loss: float = 0.0
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    reason: str = ""
    name: str = ""
    teacher: StoredTeacher | None = field(default=None, repr=False)
    images: StoredImages | None = field(default=None, repr=False)
    inversion: InversionRecord | None = None
    opinion: Opinion = Opinion()
    reply: Any = field(default=None, repr=False)
    sent: int = 0
    received: int = 0
    age: int = 0

    @property
    def called(self) -> str:
        """What reports and pictures call the client."""
        return self.name or (self.teacher.name if self.teacher is not None else f"node {self.node}")

    @property
    def admitted(self) -> bool:
        """Whether a teacher came of it."""
        return self.teacher is not None


@dataclass
class RoundRecord:
    """What one round did, for reports. Models and images are on disk; models only until the next round is over.

    Attributes:
        projections: weights in the student's space, one per teacher, as the inner strategy gets them.
        reused: images of earlier rounds that were distilled from again.
        refined: whether the student was distilled after aggregation.
        seconds: of the server's work, without waiting for clients.
    """

    round: int
    verdicts: list[Verdict] = field(default_factory=list)
    distillation: DistillationRecord = field(default_factory=DistillationRecord)
    projections: Sequence[Weights] = field(default_factory=list, repr=False)
    reused: int = 0
    refined: bool = False
    seconds: float = 0.0

    @property
    def admitted(self) -> list[Verdict]:
        """The verdicts on the teachers."""
        return [verdict for verdict in self.verdicts if verdict.admitted]

    @property
    def teachers(self) -> list[StoredTeacher]:
        """The admitted teachers, in the order of `images` and `inversions`."""
        return [verdict.teacher for verdict in self.verdicts if verdict.teacher is not None]

    @property
    def stored(self) -> list[StoredImages]:
        """Where each teacher's images are."""
        return [verdict.images for verdict in self.verdicts if verdict.images is not None]

    @property
    def images(self) -> Sequence[SparseImages]:
        """Each teacher's images, read when they are asked for."""
        return Lazily(self.stored, StoredImages.load)

    @property
    def factors(self) -> list[float]:
        """What each teacher's weight in the ensemble is multiplied by."""
        return [verdict.opinion.factor for verdict in self.admitted]

    @property
    def inversions(self) -> list[InversionRecord]:
        """What each teacher's inversion took."""
        return [verdict.inversion for verdict in self.verdicts if verdict.inversion is not None]


@dataclass(frozen=True)
class Answer:
    """What one node sent: a claim, or why there is none; and the reply, to be answered in its shape.

    Attributes:
        sent, received, age: see `Verdict`.
    """

    node: int
    claim: Claim | None = None
    failure: str = ""
    reply: Any = field(default=None, repr=False)
    sent: int = 0
    received: int = 0
    age: int = 0


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
    given = {key: spec.kwargs[key] for key in short if key in spec.kwargs}
    parts = [f"{short[key]} {'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in given.items()]
    return f"{spec.name} ({', '.join(parts)})" if parts else spec.name
