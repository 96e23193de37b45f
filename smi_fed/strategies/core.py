"""What both wrappers of Flower's strategies share: from replies to students in the student's space."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array
from torch import Tensor, nn

from smi_fed.checks import SettingError, require
from smi_fed.distillation import DistillationRecord
from smi_fed.events import Events
from smi_fed.executors import Executor, Here
from smi_fed.lazy import Lazily
from smi_fed.models import ModelSpec, build_seeded
from smi_fed.pipeline import PipelineConfig, distill_student, seeded
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import Pool, PoolConfig
from smi_fed.sparse_images import StoredImages
from smi_fed.starts import FROM_CLIENTS, check_start
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.arrivals import DISTILLATION, Arrivals
from smi_fed.strategies.beginning import NoStartError, averages, begin_from
from smi_fed.strategies.judging import check, judge
from smi_fed.strategies.left_out import start_weights
from smi_fed.strategies.memory import arguments_of
from smi_fed.strategies.round_record import Answer, RoundRecord, Weights
from smi_fed.strategies.run_state import RunState
from smi_fed.strategies.soundness import require_sound, with_sound_statistics
from smi_fed.waiting import WaitingConfig

log = logging.getLogger("smi_fed")


class Core:
    """Admits, inverts and distills; knows neither of Flower's strategy APIs.

    A round is `begin`, `admit` for each node that was asked, in any order, `invert_next` whenever
    there is time, `distill`, `refine` and `commit`. One teacher is in memory at a time, or as many as the
    executor inverts side by side.

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
        start: str = "own",
        pool: PoolConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_directory: Path | None = None,
        state_directory: Path | None = None,
        identity: Mapping[str, str] | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        known_starts: Sequence[ModelSpec] = (),
        events: Events | None = None,
        waiting: WaitingConfig | None = None,
        executor: Executor | None = None,
        inner: Any = None,
    ) -> None:
        if min_teachers < 1:
            raise SettingError("min_teachers", min_teachers, "an int >= 1")
        self.waiting = waiting or WaitingConfig()
        allowed = f"None, or at least min_teachers ({min_teachers})"
        require((self.waiting.quorum or min_teachers) >= min_teachers, "quorum", self.waiting.quorum, allowed)
        check_start(start, student, refine)
        self.start = start
        self.pipeline, self.policy = pipeline or PipelineConfig(), policy or AdmissionPolicy()
        self.min_teachers, self.projection, self.refines, self.seed = min_teachers, projection, refine, seed
        self.device, self.on_round, self.inner = torch.device(device), on_round, inner
        check(self.pipeline.distillation.robust, projection)
        self.pool, self.events = Pool(pool or PoolConfig()), events or Events()
        self.student = build_seeded(student, seed).to(self.device)
        self.state = RunState(state_directory, image_directory, self._identity() | dict(identity or {}), self.device)
        self.rounds = self.state.records()
        for line, record in zip(self.state.lines, self.rounds, strict=True):
            if record.stored:
                self._remember_images(record, line["clients"])
        if self.rounds:
            log.info("going on after round %d of %s", self.state.completed, self.state.directory)
        self.starts = start_weights(known_starts, self.student)
        expected = Expectation.with_features if start == "statistics" else Expectation.of
        self.arrivals = Arrivals(
            self.state, self.pool, self.pipeline, self.policy, expected(self.student), self.events, executor or Here(),
            waiting=self.waiting, seed=seed, device=self.device, by_node=projection != "ensemble",
        )  # fmt: skip
        self.seconds = 0.0

    def _identity(self) -> dict[str, str]:
        """All that decides the student, by name."""
        return arguments_of(self.inner) | {
            "student": self.student.spec.to_json(), "pipeline": repr(self.pipeline), "policy": repr(self.policy),
            "min_teachers": str(self.min_teachers), "projection": self.projection, "refine": str(self.refines),
            "start": self.start, "pool": repr(self.pool.config), "seed": str(self.seed), "waiting": repr(self.waiting),
        }  # fmt: skip

    @property
    def weights(self) -> Weights:
        """A copy of the student's weights, on the CPU."""
        return _copied(self.student)

    @property
    def expectation(self) -> Expectation:
        """What teachers have to fit."""
        return self.arrivals.expected

    def summary(self) -> None:
        """Log the settings."""
        inversion, distillation = self.pipeline.inversion, self.pipeline.distillation
        inner = type(self.inner).__name__
        log.info("data-free distillation on %s around %s, projection: %s", self.device, inner, self.projection)
        log.info(
            "inversion: %d images per teacher, %d iterations, %s",
            self.pipeline.images_per_teacher, inversion.iterations, inversion.summary,
        )  # fmt: skip
        log.info("start of the student: %s", self.start)
        log.info("distillation: %d steps, %s ensemble", distillation.steps, distillation.ensemble)

    @property
    def round(self) -> int:
        """The round that is going on."""
        return self.arrivals.round

    def begin(self, server_round: int, sent: Mapping[bytes, Array] | None = None) -> bool:
        """A round begins; whether its replies were all judged before a crash, so that nobody has to be asked.

        Args:
            sent: what clients are sent in this round, by its digests, so that it need not come back.
        """
        self.seconds, self.events.round = 0.0, server_round
        self.events.tell("round", "started")
        self.arrivals.expected = replace(self.expectation, known={**self.starts, **(sent or {})})
        return self.arrivals.begin(server_round)

    def admit(self, answer: Answer) -> None:
        """Judge what one node sent; an admitted model goes to disk."""
        with self._working():
            self.arrivals.admit(answer)

    def invert_next(self) -> bool:
        """See `Arrivals.invert_next`."""
        with self._working():
            return self.arrivals.invert_next()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Counts the seconds inside as the server's work in this round."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def distill(self) -> RoundRecord:
        """Images of every teacher, and from them one set of weights per teacher for the inner strategy.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted, or were left after inversion.
            NoStartError: nobody sent what the student shall start from.
            UnsoundStudentError: the student is not finite.
        """
        with self._working():
            earlier = self.rounds[-1].admitted if self.waiting.asynchronous and self.rounds else []
            record = RoundRecord(self.round, self.arrivals.settle(self.min_teachers, earlier))
            if record.round == 1 and self.start in FROM_CLIENTS:
                self._begin(record)
            self._project(record)
            return record

    def _begin(self, record: RoundRecord) -> None:
        """Give the student the start that is made of this round's replies."""
        try:
            begin_from(self.start, self.student, (teacher.load() for teacher in record.teachers))
        except NoStartError:
            self.state.forget_verdicts(record.round)  # a run that goes on shall ask again
            raise
        require_sound(self.student, f"the start from {self.start}")

    def _project(self, record: RoundRecord) -> None:
        record.refined = self.refines and all(averages(each.load(), self.student) for each in record.teachers)
        if self.refines and not record.refined:
            log.warning("round %d: replies of other architectures than the student's are projected", record.round)
        if record.refined:
            record.projections = Lazily(record.teachers, lambda teacher: _copied(teacher.load().model))
        elif self.projection == "ensemble" or not self.pipeline.distillation.steps:
            record.distillation = self._distill(record)
            record.projections = [self.weights] * len(record.teachers)
        else:
            self._project_each(record)

    def _distill(self, record: RoundRecord) -> DistillationRecord:
        """Teach the student what all teachers say of all images, earlier rounds' included."""
        reused, config = self.pool.entries, self.pipeline.distillation
        if not config.steps:
            return DistillationRecord()
        record.reused = sum(map(len, reused))
        shares = self.pool.shares(record.round, sum(map(len, record.stored))) if reused else None
        generator = seeded(self.seed, record.round, DISTILLATION)
        judge(record, config.robust, self.events)
        found = self._taught(record.teachers, record.stored, generator, shares, reused, factors=record.factors)
        require_sound(self.student, f"the distillation of round {record.round}")
        return found

    def _taught(self, teachers: Any, images: Any, *how: Any, node: str = "", **more: Any) -> DistillationRecord:
        """`distill_student` of this run's student, told to the watchers; of one node's teacher where it has a name."""
        self.events.tell("distillation", "started", node)
        tell = partial(self.events.tell, "distillation", "progress", node)
        found = distill_student(self.student, teachers, images, self.pipeline.distillation, *how, tell=tell, **more)
        self.events.tell("distillation", "ended", node, steps=found.steps, seconds=found.seconds, kept=found.kept)
        return found

    def _project_each(self, record: RoundRecord) -> None:
        """One student per teacher, each from the same weights, taught by that teacher alone."""
        before, done, projections, kept = self.weights, DistillationRecord(), [], list[str]()
        for verdict, teacher, images in zip(record.admitted, record.teachers, record.stored, strict=True):
            self.student.load_state_dict(before)
            client = self.arrivals.client(verdict)
            reused = self.pool.of(client)
            shares = self.pool.shares(record.round, len(images), client) if reused else None
            generator = self.arrivals.generator(teacher, DISTILLATION)
            found = self._taught([teacher], [images], generator, shares, reused, node=verdict.called)
            require_sound(self.student, f"the distillation of {teacher.name} in round {record.round}")
            projections.append(self.weights)
            kept.append(found.kept)
            done = DistillationRecord(
                done.steps + found.steps, done.seconds + found.seconds, done.losses + found.losses, ", ".join(kept)
            )
        record.projections, record.distillation = projections, done
        self.student.load_state_dict(before)

    def refine(
        self, record: RoundRecord, aggregated: Mapping[str, Tensor] | None, sent: Mapping[str, Tensor]
    ) -> tuple[Weights, bool]:
        """The aggregated student, after distillation where this round refines; and whether it is another than that.

        Where the inner strategy skipped the round, the student is again what was `sent`.

        Raises:
            UnsoundStudentError: it is not finite.
        """
        self.events.tell(
            "aggregation", "skipped" if aggregated is None else "ended", strategy=type(self.inner).__name__
        )
        if aggregated is None:
            self.student.load_state_dict(sent)
            return self.weights, False
        sound = with_sound_statistics(aggregated, record.projections, self.student)
        changed = any(sound[key] is not aggregated[key] for key in aggregated)
        if changed:
            log.warning("round %d: BatchNorm statistics that came out negative are the clients' mean", record.round)
        self.student.load_state_dict(sound)
        with self._working():
            if record.refined:
                record.distillation = self._distill(record)
            require_sound(self.student, f"{type(self.inner).__name__} aggregated round {record.round}")
        return self.weights, changed or record.refined

    def commit(self, record: RoundRecord) -> None:
        """Keep what later rounds need, after the inner strategy aggregated, and tell who wants to know."""
        record.seconds = self.seconds
        record.projections = []  # nobody needs them any more
        record.verdicts = [replace(verdict, reply=None) for verdict in record.verdicts]
        clients = [self.arrivals.client(verdict) for verdict in record.admitted]
        self.state.close(record, clients, self.weights, self.inner)
        if record.stored:
            self._remember_images(record, clients)
        needed = [*record.stored, *self.pool.last.values(), *(entry.source for entry in self.pool.entries)]
        self.state.forget_images_but({each.path for each in needed if isinstance(each, StoredImages)})
        self.rounds.append(record)
        self.events.tell("round", "ended", seconds=record.seconds, admitted=len(record.admitted))
        if self.on_round is not None:
            self.on_round(record)

    def _remember_images(self, record: RoundRecord, clients: list[str]) -> None:
        """Keep a round's images for later ones, but for those of teachers that were left out."""
        classes = [teacher.classes for teacher in record.teachers]
        rows = zip(clients, record.stored, classes, record.factors, strict=True)
        kept = [row[:3] for row in rows if row[3]]
        self.pool.add(record.round, *map(list, zip(*kept, strict=True)))


def _copied(model: nn.Module) -> Weights:
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
