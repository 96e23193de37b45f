"""What both wrappers of Flower's strategies share: from replies to students in the student's space."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smi_fed.alignment import interchangeable
from smi_fed.checks import SettingError
from smi_fed.distillation import DistillationRecord
from smi_fed.files import writable_directory
from smi_fed.inversion import DivergedError, SparseImages
from smi_fed.models import ModelSpec, build_seeded
from smi_fed.pipeline import InversionRecord, PipelineConfig, TrainedTeacher, distill_student, invert_teacher, seeded
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import Pool, PoolConfig
from smi_fed.strategies.admission import Expectation, Verdict, admit, cap_claims
from smi_fed.strategies.records import BadReplyError
from smi_fed.strategies.round_record import Answer, RoundRecord, TooFewTeachersError, Weights, describe
from smi_fed.strategies.run_state import RunState, image_path

log = logging.getLogger("smi_fed")


class Core:
    """Admits, inverts and distills; knows neither of Flower's strategy APIs.

    Raises:
        SettingError: at construction, for settings that cannot be.
    """

    def __init__(  # noqa: PLR0913  (`Options`, by name)
        self,
        *,
        student: ModelSpec,
        pipeline: PipelineConfig | None = None,
        policy: AdmissionPolicy | None = None,
        min_teachers: int = 2,
        projection: str = "ensemble",
        refine: bool = False,
        pool: PoolConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_directory: Path | None = None,
        state_directory: Path | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        inner: str = "",
    ) -> None:
        if min_teachers < 1:
            raise SettingError("min_teachers", min_teachers, "an int >= 1")
        self.pipeline, self.policy = pipeline or PipelineConfig(), policy or AdmissionPolicy()
        self.min_teachers, self.projection, self.refine, self.seed = min_teachers, projection, refine, seed
        self.device = torch.device(device)
        self.image_directory, self.on_round = image_directory, on_round
        self.pool = Pool(pool or PoolConfig())
        self.student = build_seeded(student, seed).to(self.device)
        self.rounds: list[RoundRecord] = []
        self.state: RunState | None = None
        if state_directory is not None:
            self.image_directory = writable_directory(image_directory or state_directory / "images")
            self.state = RunState(state_directory, self._identity() | {"strategy": inner})
            self._replay(self.state, self.image_directory)

    def _identity(self) -> dict[str, str]:
        """All that decides the student, by name."""
        return {
            "student": self.student.spec.to_json(), "pipeline": repr(self.pipeline), "policy": repr(self.policy),
            "min_teachers": str(self.min_teachers), "projection": f"{self.projection}, refine {self.refine}",
            "pool": repr(self.pool.config), "seed": str(self.seed),
        }  # fmt: skip

    def _replay(self, state: RunState, images: Path) -> None:
        """Stand where the run stood after its last finished round."""
        self.rounds = state.records(images)
        for line, record in zip(state.lines, self.rounds, strict=True):
            self.pool.add(record.round, line["clients"], record.images, line["classes"])
        if self.rounds:
            log.info("going on after round %d of %s", state.completed, state.directory)

    @property
    def weights(self) -> Weights:
        """A copy of the student's weights, on the CPU."""
        return _copied(self.student)

    @property
    def expectation(self) -> Expectation:
        """What teachers have to fit."""
        return Expectation.of(self.student)

    def summary(self, inner: str) -> None:
        """Log the settings."""
        inversion, distillation = self.pipeline.inversion, self.pipeline.distillation
        log.info("data-free distillation on %s around %s, projection: %s", self.device, inner, self.projection)
        log.info(
            "inversion: %d images per teacher, %d iterations, %s",
            self.pipeline.images_per_teacher, inversion.iterations, inversion.summary,
        )  # fmt: skip
        log.info("distillation: %d steps, %s ensemble", distillation.steps, distillation.ensemble)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for every node that was asked; refusals are logged with node and reason.

        Verdicts are in the order of the clients' own names, so that a run does not depend on
        the random node ids or on who answered first.
        """
        verdicts = [self._judge_one(answer) for answer in answers]
        for verdict in verdicts:
            if not verdict.admitted:
                log.warning("node %d refused: %s", verdict.node, verdict.reason)
        verdicts.sort(key=lambda v: (v.teacher.name if v.teacher else "~", v.node))
        teachers = iter(cap_claims([v.teacher for v in verdicts if v.teacher is not None], self.policy))
        return [replace(v, teacher=next(teachers)) if v.teacher is not None else v for v in verdicts]

    def saved_verdicts(self, server_round: int) -> list[Verdict] | None:
        """The verdicts of a round that was interrupted after its replies were judged; else None."""
        if self.state is None or not self.state.has_verdicts(server_round):
            return None
        verdicts = self.state.verdicts(server_round)
        for verdict in verdicts:
            if verdict.teacher is not None:
                verdict.teacher.model.to(self.device)
        return verdicts

    def _judge_one(self, answer: Answer) -> Verdict:
        if answer.claim is None:
            return Verdict(answer.node, reason=answer.failure)
        try:
            teacher = admit(answer.claim, self.policy, self.expectation, self.device)
        except BadReplyError as error:
            return Verdict(answer.node, reason=str(error))
        teacher = replace(teacher, name=teacher.name or f"node {answer.node}")
        architecture = describe(teacher.model.spec)
        log.info("node %d admitted: %s, %d examples", answer.node, architecture, teacher.num_examples)
        return Verdict(
            answer.node, architecture, teacher.num_examples, answer.claim.train_loss, dict(answer.claim.metrics),
            teacher=teacher, reply=answer.reply,
        )  # fmt: skip

    def learn(self, server_round: int, verdicts: list[Verdict]) -> RoundRecord:
        """Images of every teacher, and from them one set of weights per teacher for the inner strategy.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted.
        """
        record = RoundRecord(server_round, verdicts)
        self._check_teachers(record)
        if self.state is not None and not self.state.has_verdicts(server_round):
            self.state.save_verdicts(server_round, verdicts)
        self._invert_all(record)
        self._check_teachers(record)
        record.refined = self.refine and all(self._averages(teacher) for teacher in record.teachers)
        if self.refine and not record.refined:
            log.warning("round %d: replies of other architectures than the student's are projected", server_round)
        if record.refined:
            record.projections = [_copied(teacher.model) for teacher in record.teachers]
        elif self.projection == "ensemble":
            record.distillation = self._distill(record)
            record.projections = [self.weights for _ in record.teachers]
        else:
            self._project_each(record)
        return record

    def _check_teachers(self, record: RoundRecord) -> None:
        if len(record.teachers) < self.min_teachers:
            refused = [f"node {v.node}: {v.reason}" for v in record.verdicts if not v.admitted]
            raise TooFewTeachersError(
                f"round {record.round}: {len(record.teachers)} teachers admitted, {self.min_teachers} needed"
                f" ({'; '.join(refused) or 'no node replied'})"
            )

    def _invert_all(self, record: RoundRecord) -> None:
        """Images of every teacher; one whose gradients overflow is refused after all."""
        number = 0
        for place, verdict in enumerate(record.verdicts):
            if verdict.teacher is None:
                continue
            try:
                images, inversion = self._invert(record.round, number, verdict.teacher, self._client(verdict))
            except DivergedError as error:
                log.warning("node %d refused: %s", verdict.node, error)
                record.verdicts[place] = replace(verdict, reason=str(error), teacher=None, reply=None)
            else:
                record.images.append(images)
                record.inversions.append(inversion)
            number += 1

    def _client(self, verdict: Verdict) -> str:
        """What the pool tells clients apart by: a name, which survives a restart, and what its images are of.

        Where each client's update has to depend on that client alone, a name that another
        could take is not enough: the node counts.
        """
        teacher = verdict.teacher
        assert teacher is not None
        name = teacher.name if self.projection == "ensemble" else f"node {verdict.node}"
        return f"{name}, {teacher.model.image_size}, {teacher.classes}"

    def _invert(
        self, server_round: int, number: int, teacher: TrainedTeacher, client: str
    ) -> tuple[SparseImages, InversionRecord]:
        """One teacher's images; read where this round was interrupted after them, and gone on with where amid them."""
        state, directory = self.state, self.image_directory
        path = None if directory is None else image_path(directory, server_round, number)
        done = None if state is None else state.inversion(server_round, number)
        if done is not None and path is not None:
            return SparseImages.load(path), done
        images, inversion = invert_teacher(
            teacher, number, self.pipeline, self._generator(server_round, number, teacher),
            last=self.pool.last.get(client),
            checkpoint=None if state is None else state.checkpoint(server_round, number),
        )  # fmt: skip
        if path is not None:
            images.save(path)
        if state is not None:
            state.save_inversion(server_round, number, inversion)
        return images, inversion

    def _generator(self, server_round: int, number: int, teacher: TrainedTeacher) -> torch.Generator:
        """One teacher's own. Where each is projected alone not even its draws depend on who else is there."""
        if self.projection == "per_teacher":
            number = zlib.crc32(teacher.name.encode())
        return seeded(self.seed, server_round, number)

    def _distill(self, record: RoundRecord) -> DistillationRecord:
        """Teach the student what all teachers say of all images, earlier rounds' included."""
        reused, config = self.pool.entries, self.pipeline.distillation
        record.reused = sum(len(entry.images) for entry in reused)
        shares = self.pool.shares(record.round, sum(map(len, record.images))) if record.reused else None
        generator = seeded(self.seed, record.round, len(record.teachers))
        found = distill_student(self.student, record.teachers, record.images, config, generator, shares, reused)
        self._check_student(record.round)
        return found

    def _project_each(self, record: RoundRecord) -> None:
        """One student per teacher, each from the same weights, taught by that teacher alone."""
        before = self.weights
        admitted = [verdict for verdict in record.verdicts if verdict.admitted]
        for number, (verdict, teacher, images) in enumerate(zip(admitted, record.teachers, record.images, strict=True)):
            self.student.load_state_dict(before)
            client = self._client(verdict)
            reused, config = self.pool.of(client), self.pipeline.distillation
            shares = self.pool.shares(record.round, len(images), client) if reused else None
            generator = self._generator(record.round, number, teacher)
            found = distill_student(self.student, [teacher], [images], config, generator, shares, reused)
            self._check_student(record.round)
            record.projections.append(self.weights)
            done = record.distillation
            record.distillation = DistillationRecord(
                done.steps + found.steps, done.seconds + found.seconds, done.losses + found.losses
            )
        self.student.load_state_dict(before)

    def improve(
        self, record: RoundRecord, aggregated: Mapping[str, Tensor] | None, sent: Mapping[str, Tensor]
    ) -> Weights:
        """The aggregated student after distillation, where this round refines; else as it is.

        Where the inner strategy skipped the round, the student is again what was `sent`.
        """
        self.student.load_state_dict(sent if aggregated is None else aggregated)
        if record.refined and aggregated is not None:
            record.distillation = self._distill(record)
        return self.weights

    def close(self, record: RoundRecord, started: float, strategy: Any) -> None:
        """Keep what later rounds need, on disk too, and tell who wants to know.

        Args:
            strategy: the inner one, after it aggregated.
        """
        record.seconds = time.perf_counter() - started
        clients = [self._client(verdict) for verdict in record.verdicts if verdict.admitted]
        if self.state is not None:
            self.state.close(record, clients, self.weights, strategy)
        self.pool.add(record.round, clients, record.images, [teacher.classes for teacher in record.teachers])
        record.projections = []  # a copy of the student per client; nobody needs them any more
        self.rounds.append(record)
        if self.on_round is not None:
            self.on_round(record)

    def _averages(self, teacher: TrainedTeacher) -> bool:
        """Whether the teacher's weights can be averaged with the student's."""
        every = tuple(range(self.student.spec.num_classes))
        return teacher.classes in (None, every) and interchangeable(teacher.model, self.student)

    def _check_student(self, server_round: int) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.student.parameters()):
            raise FloatingPointError(f"round {server_round}: distillation diverged, the student is not finite")


def _copied(model: nn.Module) -> Weights:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
