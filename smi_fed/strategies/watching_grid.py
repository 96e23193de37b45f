"""A grid that hands on each reply as it arrives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from smi_fed.progress import Bar
from smi_fed.strategies.pulling import pull

BUSY = 4
"""Times as long as a look for replies took that is waited for the next: many nodes take many questions."""


@dataclass(frozen=True)
class Wait:
    """How one round's replies are waited for, as `DataFreeDistillation` asks for it.

    Attributes:
        take: gets each reply as it arrives, and gives what is kept of it; late ones of earlier rounds too.
        idle: called while no reply is there; returns whether there was anything to do.
        enough: whether the replies that were taken are a quorum.
        grace: seconds that are waited on for further replies once they are.
    """

    take: Callable[[Message], Message]
    idle: Callable[[], bool] = lambda: False
    enough: Callable[[], bool] = lambda: True
    grace: float = math.inf


class WatchingGrid(Grid):
    """Passes everything on to another grid; waiting for replies has a progress bar and can be used for work.

    Args:
        grid: the grid that Flower handed to the ServerApp.
        on_reply: called with each reply as it arrives.
        interval: seconds between two looks for replies.

    Attributes:
        owed: nodes by the question of training that they have not answered when its round was over.
    """

    def __init__(self, grid: Grid, on_reply: Callable[[Message], None] | None = None, interval: float = 0.5) -> None:
        self.grid, self.on_reply, self.interval = grid, on_reply, interval
        self.owed: dict[str, int] = {}
        self._next: Wait | None = None

    def hand_over(self, wait: Wait) -> None:
        """How the replies to the next messages are waited for; of training, whose late replies join a later round's."""
        self._next = wait

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull one by one until all have answered or `timeout` seconds have passed; None waits for ever.

        With a `Wait` it ends with a quorum and its grace, too; without messages it waits for late
        replies until there is a quorum. Replies that came in time while `idle` was busy are still taken.

        Returns:
            The replies to `messages`; late ones are only handed over.
        """
        messages, wait, self._next = list(messages), self._next, None
        kind = messages[0].metadata.message_type if messages else MessageType.TRAIN
        late = self.owed if wait is not None else {}
        wait = wait or Wait(lambda message: message)
        ids = self.grid.push_messages(messages) if messages else ()
        waiting = {key: each.metadata.dst_node_id for key, each in zip(ids, messages, strict=True) if key}
        replies: list[Message] = []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        if not waiting and (not late or wait.enough()):
            return replies
        with Bar(f"waiting for {kind} replies", len(messages), unit="reply") as bar:
            while True:
                bar.at(len(replies))
                began = time.monotonic()
                if wait.enough():
                    deadline = min(deadline, began + wait.grace)
                arrived = [key for key in (*late, *waiting) if self._arrived(key, wait, replies, key in waiting)]
                for key in arrived:
                    (waiting if key in waiting else late).pop(key)
                bar.at(len(replies))
                if began >= deadline or (not waiting and (not late or wait.enough())):
                    break
                if not arrived and not wait.idle():
                    time.sleep(max(self.interval, BUSY * (time.monotonic() - began)))
        late.update(waiting)
        return replies

    def _arrived(self, question: str, wait: Wait, replies: list[Message], fresh: bool) -> bool:
        """Pull the reply to one question and hand it over; whether it was there."""
        for message in pull(self.grid, question):
            if self.on_reply is not None:
                self.on_reply(message)
            kept = wait.take(message)
            if fresh:
                replies.append(kept)
            return True
        return False

    def set_run(self, *args: Any, **kwargs: Any) -> None:
        """The other grid's."""
        self.grid.set_run(*args, **kwargs)

    @property
    def run(self) -> Any:
        """The other grid's."""
        return self.grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Message:  # fmt: skip
        """The other grid's."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The other grid's."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Any:
        """The other grid's."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """The other grid's."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The other grid's."""
        return self.grid.pull_messages(message_ids)


def busy(grid: Grid) -> set[int]:
    """Nodes that still work on an earlier round's training: whatever they are asked would wait behind it."""
    return set(grid.owed.values()) if isinstance(grid, WatchingGrid) else set()
