"""Data-free distillation around any Flower strategy of the Message API: project, then aggregate."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvgM, Strategy

from smi_fed.models import Classifier
from smi_fed.strategies import records
from smi_fed.strategies.admission import Verdict
from smi_fed.strategies.core import Core
from smi_fed.strategies.options import Options
from smi_fed.strategies.round_record import Answer, RoundRecord
from smi_fed.strategies.wrapping import check_inner, layers, projected, refuse_privacy_outside


class DataFreeDistillation(Strategy):
    """Wraps a Flower strategy so that clients may have different Vision Transformers.

    Replies are admitted, each admitted model is inverted into synthetic images, students
    are distilled from them, and the inner strategy aggregates replies that all carry a
    student: it sees a homogeneous federation.

    Args:
        strategy: the inner strategy; it samples nodes, builds messages and aggregates. Any
            that aggregates arrays; differential privacy goes inside too, as
            DataFreeDistillation(DifferentialPrivacy...(...), projection="per_teacher").
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

    def __init__(self, strategy: Strategy, **options: Unpack[Options]) -> None:
        check_inner(
            strategy, Strategy, DataFreeDistillation, options.get("projection", "ensemble"),
            options.get("refine", False),
        )  # fmt: skip
        self.strategy = strategy
        self.core = Core(**options, inner=" around ".join(type(each).__name__ for each in layers(strategy)))  # type: ignore[misc]
        self._sent: list[Message] = []
        self._resumed: list[Verdict] | None = None
        self.done_before = len(self.core.rounds)
        resumed = None if self.core.state is None else self.core.state.resume(strategy)
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
        self.core.summary(type(self.strategy).__name__)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages; the student starts this round from `arrays`.

        Nobody is asked again in a round whose replies were all admitted before a crash.

        Raises:
            SettingError: differential privacy stands around this strategy and not inside.
        """
        refuse_privacy_outside(self)
        server_round += self.done_before
        self._arrays = arrays.copy()
        self.core.student.load_state_dict(arrays.to_torch_state_dict())
        self._sent = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._resumed = self.core.saved_verdicts(server_round)
        if self._resumed is not None:
            self._sent = []
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit, invert, distill; then the inner strategy aggregates the student's replies.

        Raises:
            TooFewTeachersError: fewer than `min_teachers` were admitted.
        """
        server_round += self.done_before
        started = time.perf_counter()
        verdicts = self.core.judge(self._answers(replies)) if self._resumed is None else self._resumed
        record = self.core.learn(server_round, verdicts)
        arrays, metrics = self.strategy.aggregate_train(server_round, self._project(record))
        aggregated = None if arrays is None else arrays.to_torch_state_dict()
        improved = self.core.improve(record, aggregated, self._arrays.to_torch_state_dict())
        if arrays is not None:
            arrays = ArrayRecord(improved)  # in the student's precision: FedAdam and others return doubles
            if record.refined:
                self._follow(arrays)
        self.core.close(record, started, self.strategy)
        return arrays, metrics

    def _answers(self, replies: Iterable[Message]) -> list[Answer]:
        """Every reply, and every question that got none, by the node that was asked."""
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._sent}
        answers = []
        for message in replies:
            # A failure may come from the SuperLink in the node's place; the question tells whose it was.
            node = asked.pop(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if message.has_error():
                failure = f"client failed: {message.error.reason} (code {message.error.code})"
                answers.append(Answer(node, failure=failure))
                continue
            try:
                answers.append(Answer(node, records.read_reply(message.content), reply=message))
            except records.BadReplyError as error:
                answers.append(Answer(node, failure=str(error)))
        return answers + [Answer(node, failure="no reply in time") for node in asked.values()]

    def _project(self, record: RoundRecord) -> list[Message]:
        """One reply in the student's space per admitted teacher; each has arrays of its own."""
        replies = []
        for each in projected(record, self._arrays.to_numpy_ndarrays(), self.strategy):
            verdict = each.verdict
            content = records.projected_reply(each.arrays, each.num_examples, verdict.train_loss, each.metrics)
            replies.append(_reply(verdict, content))
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


def _reply(verdict: Verdict, content: RecordDict) -> Message:
    """The node's reply with other content; a copy, since the reply itself stays as it came."""
    if verdict.reply is None:  # it came before a crash
        return Message(content=content, dst_node_id=verdict.node, message_type=MessageType.TRAIN)
    message = copy.copy(verdict.reply)
    message.content = content
    return message
