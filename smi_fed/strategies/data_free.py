"""Data-free distillation around any Flower strategy of the Message API: project, then aggregate."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Unpack

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvgM, Strategy

from smi_fed.models import Classifier
from smi_fed.strategies import records
from smi_fed.strategies.core import Core
from smi_fed.strategies.left_out import sent_weights
from smi_fed.strategies.options import Options
from smi_fed.strategies.questions import Question, Questions
from smi_fed.strategies.round_record import Answer, RoundRecord
from smi_fed.strategies.watching_grid import Wait, WatchingGrid
from smi_fed.strategies.wrapping import check_inner, check_waiting, layers, projected, refuse_privacy_outside
from smi_fed.waiting import WaitingConfig


class DataFreeDistillation(Strategy):
    """Wraps a Flower strategy so that clients may have different Vision Transformers.

    Replies are admitted, each admitted model is inverted into synthetic images, students
    are distilled from them, and the inner strategy aggregates replies that all carry a
    student: it sees a homogeneous federation.

    Args:
        strategy: the inner strategy; it samples nodes, builds messages and aggregates. Any
            that aggregates arrays; differential privacy goes inside too, as
            DataFreeDistillation(DifferentialPrivacy...(...), projection="per_teacher").
        waiting: what a round waits for, see there; it needs a `WatchingGrid`.
        options: see `Options`; `student` is required.

    Attributes:
        initial_arrays: what `start` begins with: the student's random weights, or the student
            of a run that goes on.
        done_before: rounds that were over when this object was made.

    Raises:
        SettingError: at construction, for a strategy that cannot be wrapped or settings
            that cannot be, with the reason.
        FileFormatError: at construction, for a state directory that is damaged or of another run.
    """

    def __init__(self, strategy: Strategy, waiting: WaitingConfig | None = None, **options: Unpack[Options]) -> None:
        check_inner(
            strategy, Strategy, DataFreeDistillation, options.get("projection", "ensemble"),
            options.get("refine", False), options.get("start", "own"),
        )  # fmt: skip
        self.strategy = strategy
        self.waiting = waiting or WaitingConfig()
        check_waiting(self.waiting, strategy)
        self.core = Core(**options, waiting=self.waiting, inner=strategy)  # type: ignore[misc]
        self._questions = Questions()
        self.done_before = len(self.core.rounds)
        resumed = self.core.state.resume(strategy)
        self.initial_arrays = ArrayRecord(self.core.weights) if resumed is None else resumed
        self._arrays = self.initial_arrays

    @property
    def student(self) -> Classifier:
        """The global model as it stands."""
        return self.core.student

    @property
    def rounds(self) -> list[RoundRecord]:
        """What each round did."""
        return self.core.rounds

    def remaining_rounds(self, rounds: int) -> int:
        """Of `rounds` those that a run which goes on still has to do; `start` counts them from 1 again."""
        return max(0, rounds - self.done_before)

    def summary(self) -> None:
        """Log the settings of both strategies."""
        self.core.summary()
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages; the student starts this round from `arrays`.

        Nobody is asked again in a round whose replies were all judged before a crash. A
        `WatchingGrid` hands over each reply as it arrives.

        Raises:
            SettingError: differential privacy stands around this strategy and not inside.
        """
        refuse_privacy_outside(self)
        server_round += self.done_before
        self._arrays = arrays.copy()
        self.core.student.load_state_dict(arrays.to_torch_state_dict())
        if starts := self.core.starts:
            config = ConfigRecord({**config, records.KNOWN: list(starts)})  # type: ignore[dict-item]
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        known = sent_weights(message.content for message in messages) if starts else {}
        owed = grid.owed if isinstance(grid, WatchingGrid) else ()
        messages = self._questions.begin(server_round, messages, owed, known)
        if self.core.begin(server_round, self._questions.known):
            self._questions.begin(server_round, messages := [], (), {})
        if isinstance(grid, WatchingGrid):
            grid.hand_over(Wait(self._arrived, self.core.invert_next, self._enough, self.waiting.grace))
        return messages

    def _enough(self) -> bool:
        """Whether as many models are admitted as the round waits for."""
        return self.waiting.quorum is None or self.core.arrivals.admitted >= self.waiting.quorum

    def _arrived(self, message: Message) -> Message:
        """Judge a reply to training at once, and keep no more of it than its envelope."""
        question = self._questions.answered(message)
        if question is None:
            return message
        envelope = _reply(message, RecordDict())
        self._judge(question, message, envelope)
        return envelope

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit, invert, distill; then the inner strategy aggregates the student's replies.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted.
            UnsoundStudentError: the student is not finite after distillation or aggregation.
        """
        server_round += self.done_before
        if self.core.round != server_round:
            self.core.begin(server_round)
        self._judge_all(replies)
        record = self.core.distill()
        arrays, metrics = self.strategy.aggregate_train(server_round, self._project(record))
        aggregated = None if arrays is None else arrays.to_torch_state_dict()
        improved, changed = self.core.refine(record, aggregated, self._arrays.to_torch_state_dict())
        if arrays is not None:
            arrays = ArrayRecord(improved)  # in the student's precision: FedAdam and others return doubles
            if changed:
                self._follow(arrays)
        self.core.commit(record)
        return arrays, metrics

    def _judge_all(self, replies: Iterable[Message]) -> None:
        """Every reply that did not come by `_arrived`, and every question that has none."""
        for message in replies:
            # A failure may come from the SuperLink in the node's place; the question tells whose it was.
            if question := self._questions.answered(message):
                self._judge(question, message, message)
        for question in self._questions.open.values():
            late = question.round < self.core.round
            failure = f"still at work on round {question.round}, so not asked" if late else records.failure_of(None)
            self.core.admit(Answer(question.node, failure=failure, sent=0 if late else question.sent))

    def _judge(self, question: Question, message: Message, envelope: Message) -> None:
        answer = Answer(question.node, sent=question.sent, age=self.core.round - question.round)
        if message.has_error():
            answer = replace(answer, failure=records.failure_of(message))
        else:
            answer = replace(answer, received=records.size_of(message.content))
            try:
                answer = replace(answer, claim=records.read_reply(message.content), reply=envelope)
            except records.BadReplyError as error:
                answer = replace(answer, failure=str(error))
        self.core.admit(answer)

    def _project(self, record: RoundRecord) -> list[Message]:
        """One reply in the student's space per admitted teacher; strategies may empty its records, not its arrays."""
        replies, known, shared = [], None, dict[str, Array]()
        for each in projected(record, self._arrays.to_numpy_ndarrays(), self.strategy):
            if each.arrays is not known:
                known, shared = each.arrays, {key: Array(np.asarray(value)) for key, value in each.arrays.items()}
            verdict = each.verdict
            content = records.projected_reply(shared, each.num_examples, verdict.train_loss, each.metrics)
            question = verdict.reply  # None where it came before a crash
            replies.append(
                Message(content=content, dst_node_id=verdict.node, message_type=MessageType.TRAIN)
                if question is None
                else _reply(question, content)
            )
        return replies

    def _follow(self, arrays: ArrayRecord) -> None:
        """FedAvgM keeps the global model itself; it goes on from the refined one."""
        for layer in layers(self.strategy):
            if isinstance(layer, FedAvgM):
                layer.current_arrays = arrays.copy()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's."""
        return self.strategy.configure_evaluate(server_round + self.done_before, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The inner strategy's."""
        return self.strategy.aggregate_evaluate(server_round + self.done_before, replies)


def _reply(message: Message, content: RecordDict) -> Message:
    """A reply with other content; a copy, since the reply itself stays as it came. One with an error stays as it is."""
    if message.has_error():
        return message
    other = copy.copy(message)
    other.content = content
    return other
