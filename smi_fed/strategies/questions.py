"""What nodes were asked, until they answer: in this round, and in earlier ones whose replies are late."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Array, Message

from smi_fed.strategies import records


@dataclass(frozen=True)
class Question:
    """What one node was asked.

    Attributes:
        sent: bytes that went to it, see `records.size_of`.
        known: arrays that went to it, by digest, so that they need not come back.
    """

    node: int
    round: int
    sent: int = 0
    known: Mapping[bytes, Array] = field(default_factory=dict, repr=False)


class Questions:
    """Every question that has no answer yet. A node has one at most: while it is open it is asked nothing more."""

    def __init__(self) -> None:
        self._asked: list[tuple[Message, Question]] = []
        self._open: dict[str, Question] = {}

    def begin(
        self, server_round: int, messages: Iterable[Message], owed: Collection[str], known: Mapping[bytes, Array]
    ) -> list[Message]:
        """A round begins; of its `messages` those to nodes that have nothing open.

        Args:
            owed: ids of earlier questions that can still be answered.
            known: see `Question`.
        """
        self._open = {key: question for key, question in self.open.items() if key in owed}
        busy, sizes = {question.node for question in self._open.values()}, dict[int, int]()
        for message in messages:
            node, content = message.metadata.dst_node_id, message.content
            if node not in busy:
                if id(content) not in sizes:  # messages mostly share theirs
                    sizes[id(content)] = records.size_of(content)
                self._asked.append((message, Question(node, server_round, sizes[id(content)], known)))
        return [message for message, _ in self._asked]

    @property
    def open(self) -> dict[str, Question]:
        """All by the ids that messages have once they were sent."""
        self._open |= {message.metadata.message_id: question for message, question in self._asked}
        self._asked = []
        return self._open

    def answered(self, message: Message) -> Question | None:
        """What a reply answers, once; None where it answers none of these."""
        return self.open.pop(message.metadata.reply_to_message_id, None)

    @property
    def known(self) -> dict[bytes, Array]:
        """What need not come back in the replies to any of them."""
        every = (*self._open.values(), *(question for _, question in self._asked))
        return {key: array for question in every for key, array in question.known.items()}
