"""A Flower strategy that also has every client measure the student, and its own model, on its own images."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from smi_fed.strategies.evaluation import Evaluated, named, shares
from smi_fed.strategies.evaluation_records import pack_question, read_evaluation
from smi_fed.strategies.records import BadReplyError, failure_of
from smi_fed.strategies.watching_grid import busy

log = logging.getLogger("smi_fed")


class FederatedEvaluation(Strategy):
    """Wraps a strategy whose clients answer as `clients.app` does; training stays the strategy's.

    After each round every node is asked that is connected and that did not leave the round's
    training without an answer. One that fails is told of with its reason; the others count.

    Args:
        strategy: `DataFreeDistillation` or one of Flower's.
        classes: of the student.
        most: images that a client may claim.

    Attributes:
        rounds: what came of each round's evaluation.
    """

    def __init__(self, strategy: Strategy, classes: int, most: int = 10_000_000) -> None:
        self.strategy, self.classes, self.most = strategy, classes, most
        self.done_before = getattr(strategy, "done_before", 0)
        self.rounds: dict[int, list[Evaluated]] = {}
        self._names: dict[int, str] = {}
        self._trained: list[Message] = []
        self._asked: list[Message] = []
        self._silent: set[int] = set()
        self._missing: list[Evaluated] = []

    def summary(self) -> None:
        """The strategy's."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        self._trained = list(self.strategy.configure_train(server_round, arrays, config, grid))
        return self._trained

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's."""
        replies = list(replies)
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        unanswered = (each.metadata for each in self._trained if each.metadata.message_id not in answered)
        self._silent = {each.dst_node_id for each in unanswered}
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A question to each node, none of which is waited for: Flower's own sampling would, for one that is gone."""
        connected = set(grid.get_node_ids())
        gone = {message.metadata.dst_node_id for message in self._trained} - connected
        reasons = dict.fromkeys(gone, "not connected any more")
        reasons |= dict.fromkeys(busy(grid) - gone, "still at work on its training")
        reasons |= dict.fromkeys(self._silent, "no reply in time to this round's training")
        self._missing = [self._failed(node, reason) for node, reason in reasons.items()]
        self._asked = [
            Message(pack_question(self.done_before + server_round, arrays), node, MessageType.EVALUATE)
            for node in sorted(connected - reasons.keys())
        ]
        return self._asked

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep what came of each node in `rounds`; the mean over held-out images goes to Flower's log."""
        found = [*self._missing, *self._judged(replies)]
        self._names |= {each.node: each.name for each in found}
        verdicts = (verdict for record in getattr(self.strategy, "rounds", ()) for verdict in record.verdicts)
        lines = named(found, {verdict.node: verdict.called for verdict in verdicts if verdict.admitted})
        self.rounds[self.done_before + server_round] = lines
        for each in lines:
            if each.reason:
                log.warning("%s, node %d was not evaluated: %s", each.name, each.node, each.reason)
        mean = shares([each.measured.total for each in lines if each.measured is not None])
        if not mean["images"]:
            log.warning("round %d: no client measured anything", self.done_before + server_round)
            return None
        measured = {key: mean[key] for key in ("images", "student_accuracy", "own_accuracy") if mean[key] is not None}
        return MetricRecord(measured)

    def _judged(self, replies: Iterable[Message]) -> list[Evaluated]:
        """Every node that was asked; a failure may come from the SuperLink in its place."""
        answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [
            self._judge(asked.metadata.dst_node_id, answers.get(asked.metadata.message_id)) for asked in self._asked
        ]

    def _judge(self, node: int, reply: Message | None) -> Evaluated:
        if reply is None or reply.has_error():
            return self._failed(node, failure_of(reply))
        try:
            measured = read_evaluation(reply.content, self.classes, self.most)
        except BadReplyError as error:
            return self._failed(node, str(error))
        return Evaluated(node, measured.name, measured)

    def _failed(self, node: int, reason: str) -> Evaluated:
        return Evaluated(node, self._names.get(node, ""), reason=reason)

    def again(self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> None:
        """Evaluate once more after round `server_round`, counted over the whole run, without training."""
        within = server_round - self.done_before
        messages = self.configure_evaluate(within, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(within, grid.send_and_receive(messages, timeout=timeout))
