"""Data-free distillation around any Flower strategy: project, then aggregate."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from smi_fed.distillation import DistillationRecord
from smi_fed.inversion import SparseImages
from smi_fed.models import ModelSpec, build_model
from smi_fed.pipeline import (
    InversionRecord,
    PipelineConfig,
    TrainedTeacher,
    distill_student,
    invert_teacher,
    seeded,
)
from smi_fed.strategies import records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, Verdict, admit, cap_claims

log = logging.getLogger("smi_fed")


class TooFewTeachersError(RuntimeError):
    """Fewer teachers were admitted than the run needs; the message lists every refusal."""


@dataclass
class RoundRecord:
    """What one round did, for reports."""

    round: int
    verdicts: list[Verdict] = field(default_factory=list)
    images: list[SparseImages] = field(default_factory=list)
    inversions: list[InversionRecord] = field(default_factory=list)
    distillation: DistillationRecord = field(default_factory=DistillationRecord)
    seconds: float = 0.0

    @property
    def teachers(self) -> list[TrainedTeacher]:
        """The admitted teachers, in the order of `images` and `inversions`."""
        return [verdict.teacher for verdict in self.verdicts if verdict.teacher is not None]


class DataFreeDistillation(Strategy):
    """Wraps a Flower strategy so that clients may have different Vision Transformers.

    Replies are admitted, each admitted model is inverted into synthetic images, the student
    is distilled from all of them, and the inner strategy aggregates replies that all carry
    the student: it sees a homogeneous federation.

    Args:
        strategy: the inner strategy; it samples nodes, builds messages and aggregates.
        student: spec of the global model.
        pipeline: settings of inversion and distillation.
        policy: what a client may claim.
        min_teachers: fewer admitted teachers end the run.
        seed: of targets, inversion and distillation.
        device: where inversion and distillation run.
        image_directory: where each teacher's images are written as soon as they are done;
            None keeps them in memory only.
        on_round: called with the finished `RoundRecord`.

    Raises:
        ValueError: at construction, for settings that cannot be.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        student: ModelSpec,
        pipeline: PipelineConfig | None = None,
        policy: AdmissionPolicy | None = None,
        min_teachers: int = 2,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_directory: Path | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise ValueError(f"strategy: got {type(strategy).__name__}, allowed: a flwr.serverapp.strategy.Strategy")
        if min_teachers < 1:
            raise ValueError(f"min_teachers: got {min_teachers}, allowed: an int >= 1")
        self.strategy = strategy
        self.pipeline = pipeline or PipelineConfig()
        self.policy = policy or AdmissionPolicy()
        self.min_teachers, self.seed = min_teachers, seed
        self.device = torch.device(device)
        self.image_directory, self.on_round = image_directory, on_round
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_model(student).to(self.device)
        self.rounds: list[RoundRecord] = []
        self._sent: list[Message] = []

    @property
    def initial_arrays(self) -> ArrayRecord:
        """The student's random weights, for `start`."""
        return ArrayRecord({key: value.cpu() for key, value in self.student.state_dict().items()})

    def summary(self) -> None:
        """Log the settings of both strategies."""
        inversion, distillation = self.pipeline.inversion, self.pipeline.distillation
        log.info("data-free distillation on %s around %s", self.device, type(self.strategy).__name__)
        log.info(
            "inversion: %d images per teacher, %d iterations, schedule '%s', %s patches, %s",
            self.pipeline.images_per_teacher, inversion.iterations, inversion.schedule, inversion.selection,
            inversion.parametrisation,
        )  # fmt: skip
        log.info("distillation: %d steps, %s ensemble", distillation.steps, distillation.ensemble)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages; the student starts this round from `arrays`."""
        self.student.load_state_dict(arrays.to_torch_state_dict())
        self._sent = list(self.strategy.configure_train(server_round, arrays, config, grid))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit, invert, distill; then the inner strategy aggregates the student's replies.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted.
        """
        started = time.perf_counter()
        replies = list(replies)
        verdicts = self.judge(replies)
        record = RoundRecord(server_round, verdicts)
        if len(record.teachers) < self.min_teachers:
            reasons = "; ".join(f"node {v.node}: {v.reason}" for v in verdicts if not v.admitted) or "no node replied"
            raise TooFewTeachersError(
                f"round {server_round}: {len(record.teachers)} teachers admitted, {self.min_teachers} needed"
                f" ({reasons})"
            )
        for number, teacher in enumerate(record.teachers):
            generator = seeded(self.seed, server_round, number)
            images, inversion = invert_teacher(teacher, number, self.pipeline, generator)
            record.images.append(images)
            record.inversions.append(inversion)
            if self.image_directory is not None:
                images.save(self.image_directory / f"round{server_round}-teacher{number}.safetensors")
        record.distillation = distill_student(
            self.student, record.teachers, record.images, self.pipeline.distillation,
            seeded(self.seed, server_round, len(record.teachers)),
        )  # fmt: skip
        if not all(bool(weight.isfinite().all()) for weight in self.student.parameters()):
            raise FloatingPointError(f"round {server_round}: distillation diverged, the student is not finite")
        result = self.strategy.aggregate_train(server_round, self._project(verdicts))
        record.seconds = time.perf_counter() - started
        self.rounds.append(record)
        if self.on_round is not None:
            self.on_round(record)
        return result

    def judge(self, replies: Sequence[Message]) -> list[Verdict]:
        """A verdict for every node that was asked; refusals are logged with node and reason.

        Verdicts are in the order of the clients' own names, so that a run does not depend on
        the random node ids or on who answered first.
        """
        expected = Expectation.of(self.student)
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._sent}
        verdicts = []
        for message in replies:
            # A failure may come from the SuperLink in the node's place; the question tells whose it was.
            node = asked.pop(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            verdicts.append(self._judge_one(node, message, expected))
        verdicts += [Verdict(node, reason="no reply in time") for node in asked.values()]
        for verdict in verdicts:
            if not verdict.admitted:
                log.warning("node %d refused: %s", verdict.node, verdict.reason)
        verdicts.sort(key=lambda v: (v.teacher.name if v.teacher else "~", v.node))
        teachers = iter(cap_claims([v.teacher for v in verdicts if v.teacher is not None], self.policy))
        return [replace(v, teacher=next(teachers)) if v.teacher is not None else v for v in verdicts]

    def _judge_one(self, node: int, message: Message, expected: Expectation) -> Verdict:
        if message.has_error():
            return Verdict(node, reason=f"client failed: {message.error.reason} (code {message.error.code})")
        try:
            claim = records.read_reply(message.content)
            teacher = admit(claim, self.policy, expected, self.device)
        except records.BadReplyError as error:
            return Verdict(node, reason=str(error))
        teacher = replace(teacher, name=teacher.name or f"node {node}")
        architecture = describe(teacher.model.spec)
        log.info("node %d admitted: %s, %d examples", node, architecture, teacher.num_examples)
        return Verdict(node, architecture, teacher.num_examples, claim.train_loss, teacher=teacher, reply=message)

    def _project(self, verdicts: Sequence[Verdict]) -> list[Message]:
        """One reply with the student per admitted teacher; each has arrays of its own."""
        weights = self.student.state_dict()
        projected = []
        for verdict in verdicts:
            if verdict.teacher is not None and verdict.reply is not None:
                message = copy.copy(verdict.reply)  # the reply itself stays as it came
                message.content = records.projected_reply(weights, verdict.teacher.num_examples, verdict.train_loss)
                projected.append(message)
        return projected

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The inner strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)


def describe(spec: ModelSpec) -> str:
    """An architecture in a few words: its name and what its arguments change."""
    short = {"patch_size": "patch", "embed_dim": "width", "depth": "depth", "num_heads": "heads"}
    parts = [f"{word} {spec.kwargs[key]}" for key, word in short.items() if key in spec.kwargs]
    return f"{spec.name} ({', '.join(parts)})" if parts else spec.name
