"""What comes of the nodes that were asked in a round: replies are judged, admitted models inverted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smi_fed.events import Events
from smi_fed.executors import Executor, InversionJob, WorkerDiedError
from smi_fed.files import FileFormatError
from smi_fed.inversion import DivergedError
from smi_fed.pipeline import PipelineConfig, seeded
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import Pool
from smi_fed.sparse_images import StoredImages
from smi_fed.strategies.admission import admit, cap_claims
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.in_hand import Inverting, Shown
from smi_fed.strategies.records import BadReplyError
from smi_fed.strategies.round_record import Answer, TooFewTeachersError, Verdict, describe
from smi_fed.strategies.run_state import RunState, client_number, file_name
from smi_fed.teachers import StoredTeacher
from smi_fed.waiting import WaitingConfig

log = logging.getLogger("smi_fed")

INVERSION, DISTILLATION = range(2)
"""Purposes of random draws, so that no two share theirs."""


class Arrivals:
    """One round's verdicts as they come; as many teachers are in memory as the executor inverts side by side.

    Args:
        state: where models and images go.
        pool: images to start inversions from.
        pipeline: settings of the inversion.
        policy, expected: what is admitted.
        events: what is told of replies and inversions.
        executor: who inverts.
        waiting: what late models count.
        seed: of every draw.
        device: where teachers are inverted.
        by_node: what a client is told apart by, see `client`.
    """

    def __init__(  # noqa: PLR0913  (what a round is made of)
        self,
        state: RunState,
        pool: Pool,
        pipeline: PipelineConfig,
        policy: AdmissionPolicy,
        expected: Expectation,
        events: Events,
        executor: Executor,
        *,
        waiting: WaitingConfig,
        seed: int,
        device: torch.device,
        by_node: bool,
    ) -> None:
        self.state, self.pool, self.pipeline, self.policy, self.expected = state, pool, pipeline, policy, expected
        self.events, self.executor, self.waiting = events, executor, waiting
        self.seed, self.device, self.by_node = seed, device, by_node
        self.round, self.verdicts, self.in_hand = 0, list[Verdict](), dict[Path, Inverting]()
        self.owners, self.names = dict[str, int](), dict[int, str]()
        self.classes: tuple[str, ...] | None = None

    def begin(self, server_round: int) -> bool:
        """A round begins; whether its replies were all judged before a crash, so that nobody has to be asked."""
        self.round, self.verdicts = server_round, []
        try:
            self.verdicts = [self._checked(verdict) for verdict in self.state.verdicts(server_round)]
        except (FileNotFoundError, FileFormatError) as error:
            log.warning("round %d: everybody is asked again, since a model is lost: %s", server_round, error)
            self.state.forget_verdicts(server_round)
        self.names |= {verdict.node: verdict.called for verdict in self.verdicts if verdict.admitted}
        return bool(self.verdicts)

    def _checked(self, verdict: Verdict) -> Verdict:
        """A verdict from before a crash whose files are whole; lost images are to be made again.

        Raises:
            FileNotFoundError, FileFormatError: the model is lost.
        """
        if verdict.teacher is not None:
            verdict.teacher.load(verify=True)
        whole = verdict.images is None or self.state.has_images(verdict.images)
        return verdict if whole else replace(verdict, images=None, inversion=None)

    def admit(self, answer: Answer) -> None:
        """Judge what one node sent; an admitted model goes to disk, a refusal is logged with node and reason."""
        if answer.claim is not None:
            self._tell(answer.node, "reply", "arrived")
        verdict = replace(self._judge(answer), sent=answer.sent, received=answer.received, age=answer.age)
        if verdict.admitted:
            about = {key: getattr(verdict, key) for key in ("architecture", "num_examples", "train_loss", "age")}
            self._tell(verdict.node, "reply", "admitted", **about)
        else:
            log.warning("%snode %d refused: %s", verdict.name and f"{verdict.name}, ", verdict.node, verdict.reason)
            self._tell(verdict.node, "reply", "refused", claimed_name=verdict.name, reason=verdict.reason)
        self.verdicts.append(verdict)

    def _tell(self, node: int, stage: str, name: str, **values: Any) -> None:
        """By the name that the node was admitted under, not by what it claims."""
        self.events.tell(stage, name, self.names.get(node, f"node {node}"), id=str(node), **values)

    def _judge(self, answer: Answer) -> Verdict:
        if answer.claim is None:
            return Verdict(answer.node, reason=answer.failure, name=self.names.get(answer.node, ""))
        try:
            # Class statistics are for the student's start alone.
            expected = self.expected if self.round - answer.age == 1 else replace(self.expected, features=0)
            teacher = admit(answer.claim, self.policy, expected, self.device)
            self._agree(teacher.spec.class_names)
        except BadReplyError as error:
            return Verdict(answer.node, reason=str(error), name=answer.claim.name)
        name, factor = teacher.name or f"node {answer.node}", self.waiting.weight(answer.age)
        teacher = replace(teacher, name=name, factor=factor)
        self.names[answer.node] = name = self._called(teacher.name, answer.node)
        stored = self.state.keep_teacher(self.round, teacher, file_name(name))
        architecture = describe(teacher.spec)
        late = f", asked in round {self.round - answer.age}" if answer.age else ""
        log.info("%s, node %d admitted: %s, %d examples%s",
                 name, answer.node, architecture, teacher.num_examples, late)  # fmt: skip
        return Verdict(
            answer.node, architecture, teacher.num_examples, answer.claim.train_loss, dict(answer.claim.metrics),
            name=name, teacher=stored, reply=answer.reply,
        )  # fmt: skip

    def _agree(self, names: tuple[str, ...] | None) -> None:
        """Labels are numbers: where the student's have no names, all clients have to mean the same ones."""
        if self.expected.student.class_names is not None or names is None:
            return
        self.classes = self.classes or names
        if names != self.classes:
            others = ", ".join(self.classes)
            reason = f"its classes are {', '.join(names)}, another node's {others}; the student's class_names say which"
            raise BadReplyError(reason)

    def _called(self, name: str, node: int) -> str:
        """The name of a client; with its node where another node had that name before.

        A name from outside has no brackets, so nobody can take this one. Draws go by the name
        that the client sent: none depends on who else has it.
        """
        if self.owners.setdefault(name, node) == node:
            return name
        log.warning("two nodes have the name %r: node %d is told apart by its number", name, node)
        return f"{name} (node {node})"

    def invert_next(self) -> bool:
        """Hand over one admitted teacher that was not, and take in what is done; whether there was anything to do.

        Without distillation nobody needs images.
        """
        waiting = self._waiting() if self.pipeline.distillation.steps else None
        if waiting is not None:
            self._hand_over(waiting)
        done = [path for path, inversion in self.in_hand.items() if inversion.future.done()]
        for path in done:
            self._take_in(self.in_hand.pop(path))
        return waiting is not None or bool(done)

    def _waiting(self) -> Verdict | None:
        """The first whose teacher is to be inverted."""
        for verdict in self.verdicts:
            if verdict.teacher is not None and verdict.images is None and verdict.teacher.path not in self.in_hand:
                return verdict
        return None

    def _hand_over(self, verdict: Verdict) -> None:
        stored = verdict.teacher
        assert stored is not None
        done = self.state.inverted(stored)
        if done is not None:  # before a crash
            self._replace(stored, images=done[0], inversion=done[1])
            return
        last = self.pool.last.get(self.client(verdict))
        assert last is None or isinstance(last, StoredImages)
        job = InversionJob(
            stored, client_number(stored.name), self.pipeline, self._draws(stored, INVERSION),
            self.state.image_path(stored), self.state.checkpoint(stored), last,
        )  # fmt: skip
        tell = partial(self._tell, verdict.node, "inversion")
        shown = Shown(stored.name, self.pipeline.inversion.iterations, tell)
        self.in_hand[stored.path] = Inverting(stored, verdict.node, shown, self.executor.submit(job, shown))

    def _take_in(self, inversion: Inverting) -> None:
        """The teacher's images; a refusal after all where its gradients overflow or its workers die."""
        try:
            record = inversion.future.result()
        except (DivergedError, WorkerDiedError) as error:
            log.warning("node %d refused: %s", inversion.node, error)
            inversion.shown.end("failed", reason=str(error))
            self._replace(inversion.teacher, reason=str(error), teacher=None, reply=None)
            return
        inversion.shown.end("ended", images=record.images, seconds=record.seconds, kept_fraction=record.kept_fraction)
        self._replace(inversion.teacher, images=self.state.keep_images(inversion.teacher, record), inversion=record)

    def _replace(self, stored: StoredTeacher, **changes: Any) -> None:
        """Change the verdict on a teacher."""
        self.verdicts = [
            replace(each, **changes) if each.teacher is not None and each.teacher.path == stored.path else each
            for each in self.verdicts
        ]

    def _wait(self) -> bool:
        """Until one of those in hand is done; whether there was any."""
        wait([each.future for each in self.in_hand.values()], return_when=FIRST_COMPLETED)
        return bool(self.in_hand)

    @property
    def admitted(self) -> int:
        """How many models were admitted up to now."""
        return sum(verdict.admitted for verdict in self.verdicts)

    def settle(self, least: int, earlier: Sequence[Verdict] = ()) -> list[Verdict]:
        """All verdicts, every teacher inverted.

        They are in the order of the clients' own names, so that a run does not depend on the
        random node ids or on who answered first.

        Args:
            earlier: of the round before; whose client has no model in this one goes on as a teacher.

        Raises:
            TooFewTeachersError: fewer than `least` teachers were admitted, or are left after inversion.
        """
        present = {verdict.called for verdict in self.verdicts if verdict.admitted}
        self.verdicts += [self._older(verdict) for verdict in earlier if verdict.called not in present]
        self.verdicts.sort(key=lambda v: (v.teacher.name if v.teacher else "~", v.node))
        self._require_teachers(least)
        self.state.keep_verdicts(self.round, self.verdicts)
        while self.invert_next() or self._wait():
            pass
        self._require_teachers(least)
        # Only now, so that a claim's cap does not depend on when a teacher was found to diverge.
        teachers = iter(cap_claims([v.teacher for v in self.verdicts if v.teacher is not None], self.policy))
        self.verdicts = [replace(v, teacher=next(teachers)) if v.teacher is not None else v for v in self.verdicts]
        self.state.keep_verdicts(self.round, self.verdicts)
        return self.verdicts

    def _older(self, verdict: Verdict) -> Verdict:
        """An earlier round's verdict in this one."""
        assert verdict.teacher is not None
        age = verdict.age + 1
        teacher = replace(verdict.teacher, factor=self.waiting.weight(age))
        return replace(verdict, age=age, teacher=teacher, reply=None, sent=0, received=0)

    def _require_teachers(self, least: int) -> None:
        if self.admitted < least:
            self.state.forget_verdicts(self.round)  # a run that goes on shall ask again
            refused = [f"node {v.node}: {v.reason}" for v in self.verdicts if not v.admitted]
            raise TooFewTeachersError(
                f"round {self.round}: {self.admitted} teachers admitted, {least} needed"
                f" ({'; '.join(refused) or 'no node replied'})"
            )

    def client(self, verdict: Verdict) -> str:
        """What the pool tells clients apart by: a name, which survives a restart, and what its images are of.

        Where each client's update has to depend on that client alone, a name that another
        could take is not enough: the node counts.
        """
        teacher = verdict.teacher
        assert teacher is not None
        name = f"node {verdict.node}" if self.by_node else verdict.called
        return f"{name}, {teacher.spec.image_size or teacher.spec.kwargs.get('img_size')}, {teacher.classes}"

    def generator(self, teacher: StoredTeacher, purpose: int) -> torch.Generator:
        """One teacher's own in this round, whoever else is there."""
        return seeded(*self._draws(teacher, purpose))

    def _draws(self, teacher: StoredTeacher, purpose: int) -> tuple[int, ...]:
        return self.seed, self.round, client_number(teacher.name), purpose
