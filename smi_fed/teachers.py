"""A client's model on the server: in memory, or on disk until its turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fed.alignment import Aligned
from smi_fed.class_statistics import ClassStatistics
from smi_fed.files import checksums, load_tensors, reading, save_tensors
from smi_fed.inversion import FeatureStatistics
from smi_fed.models import Classifier, ModelSpec, build_model

FORMAT, VERSION = "smi-fed.teacher", 2
SUMS = "class-statistics."


@dataclass(frozen=True, eq=False)
class TrainedTeacher:
    """A client's model on the server, after admission.

    Attributes:
        name: how the client is called in reports.
        model: its classifier.
        num_examples: that it claims to have trained on, capped.
        label_counts: examples of each of its own classes, as it told them; None where it did not.
        statistics: for the feature-statistics prior; None where the client did not send them.
        classes: for each of its classes the index among the student's; None where they are the same.
        num_classes: the student's; None where `classes` is.
        class_statistics: of the student's start, for `strategy.start=statistics`; None where the client sent none.
        factor: how much it is heard beside others, in (0, 1]: less where its reply is late.
    """

    name: str
    model: Classifier
    num_examples: int
    label_counts: tuple[int, ...] | None = None
    statistics: FeatureStatistics | None = None
    classes: tuple[int, ...] | None = None
    num_classes: int | None = None
    class_statistics: ClassStatistics | None = None
    factor: float = 1.0

    @property
    def spec(self) -> ModelSpec:
        """What the model was built from."""
        return self.model.spec

    @property
    def aligned(self) -> Aligned:
        """The model in the student's terms: any image size in, the student's classes out."""
        own = self.spec.num_classes
        return Aligned(self.model, self.classes or range(own), self.num_classes or own)

    @property
    def aligned_counts(self) -> tuple[float, ...]:
        """See `aligned_counts`."""
        return aligned_counts(self)

    @property
    def digest(self) -> str:
        """A name for all that decides its images: the same teacher, the same name."""
        tensors = {f"model.{key}": value.cpu() for key, value in self.model.state_dict().items()}
        sums = checksums(tensors | _statistics_tensors(self.statistics), {})
        known = (sums, self.spec.to_json(), self.label_counts)
        return hashlib.sha256(repr(known).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class StoredTeacher:
    """A teacher whose weights and statistics are in a file; the rest of a `TrainedTeacher` is at hand.

    Attributes:
        path: what `store` wrote.
        device: where it is loaded to.
        digest: of the stored teacher.
    """

    path: Path
    device: torch.device
    digest: str
    name: str
    spec: ModelSpec
    num_examples: int
    label_counts: tuple[int, ...] | None = None
    classes: tuple[int, ...] | None = None
    num_classes: int | None = None
    factor: float = 1.0

    @property
    def aligned(self) -> Aligned:
        """See `TrainedTeacher`; loaded each time."""
        return self.load().aligned

    @property
    def aligned_counts(self) -> tuple[float, ...]:
        """See `aligned_counts`."""
        return aligned_counts(self)

    def load(self, *, verify: bool = False) -> TrainedTeacher:
        """The teacher on its device, in evaluation mode.

        Args:
            verify: compare the file with its checksums.

        Raises:
            FileNotFoundError, FileFormatError: naming the file and what is wrong with it.
        """
        tensors, metadata = load_tensors(self.path, FORMAT, VERSION, verify=verify)
        with reading(self.path):
            return self._built(tensors, metadata)

    def _built(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TrainedTeacher:
        with torch.random.fork_rng(devices=[]):  # the random start of its weights is nobody's draw
            model = build_model(self.spec)
        model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
        means, stds = (
            tuple(tensors[f"{kind}.{i}"].clone() for i in range(sum(k.startswith(f"{kind}.") for k in tensors)))
            for kind in ("mean", "std")
        )
        known = FeatureStatistics(means, stds, int(metadata["examples"])) if means else None
        return TrainedTeacher(
            self.name, model.eval().to(self.device), self.num_examples, self.label_counts, known, self.classes,
            self.num_classes, _stored_sums(tensors), self.factor,
        )  # fmt: skip


AnyTeacher = TrainedTeacher | StoredTeacher


def aligned_counts(teacher: AnyTeacher) -> tuple[float, ...]:
    """Examples of each of the student's classes, the teacher's `num_examples` together.

    In the proportions that the client told; evenly over its classes where it told none.
    """
    own = teacher.spec.num_classes
    shares = teacher.label_counts or (1,) * own
    counts = [0.0] * (teacher.num_classes or own)
    for place, count in zip(teacher.classes or range(own), shares, strict=True):
        counts[place] = teacher.num_examples * count / max(1, sum(shares))
    return tuple(counts)


def store(teacher: TrainedTeacher, path: Path) -> StoredTeacher:
    """Write a teacher, atomically; it is loaded to the device on which it is now."""
    tensors = {f"model.{key}": value for key, value in teacher.model.state_dict().items()}
    known, sums = teacher.statistics, teacher.class_statistics
    tensors |= {} if sums is None else {f"{SUMS}{key}": value for key, value in vars(sums).items()}
    save_tensors(
        path, tensors | _statistics_tensors(known), FORMAT, VERSION, spec=teacher.spec.to_json(),
        examples=str(0 if known is None else known.examples),
    )  # fmt: skip
    return StoredTeacher(
        path, teacher.model.mean.device, teacher.digest, teacher.name, teacher.spec, teacher.num_examples,
        teacher.label_counts, teacher.classes, teacher.num_classes, teacher.factor,
    )  # fmt: skip


def facts_of(teacher: StoredTeacher) -> dict[str, Any]:
    """All of a stored teacher but its device and directory, as JSON has it; undone by `stored_from`."""
    facts = {key: value for key, value in vars(teacher).items() if key not in ("path", "device", "spec")}
    return facts | {"file": teacher.path.name, "spec": teacher.spec.to_json()}


def stored_from(facts: dict[str, Any], directory: Path, device: torch.device) -> StoredTeacher:
    """The teacher that `facts_of` told of, whose file stands in `directory`."""
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    path, spec = directory / rest.pop("file"), ModelSpec.from_json(rest.pop("spec"))
    return StoredTeacher(path=path, device=device, spec=spec, **rest)


def _stored_sums(tensors: Mapping[str, Tensor]) -> ClassStatistics | None:
    found = {key.removeprefix(SUMS): tensor.clone() for key, tensor in tensors.items() if key.startswith(SUMS)}
    return ClassStatistics(**found) if found else None


def _statistics_tensors(known: FeatureStatistics | None) -> dict[str, Tensor]:
    if known is None:
        return {}
    pairs = {"mean": known.mean, "std": known.std}
    return {f"{kind}.{i}": each.cpu() for kind, layers in pairs.items() for i, each in enumerate(layers)}
