"""A grid that hands on each reply as it arrives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from smi_fed.progress import Bar
from smi_fed.strategies.pulling import pull

BUSY = 4
"""Times as long as a look for replies took that is waited for the next: many nodes take many questions."""


class WatchingGrid(Grid):
    """Passes everything on to another grid; waiting for replies has a progress bar and can be used for work.

    Args:
        grid: the grid that Flower handed to the ServerApp.
        on_reply: called with each reply as it arrives.
        interval: seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, on_reply: Callable[[Message], None] | None = None, interval: float = 0.5) -> None:
        self.grid, self.on_reply, self.interval = grid, on_reply, interval
        self.hand_over(lambda message: message, lambda: False)

    def hand_over(self, take: Callable[[Message], Message], idle: Callable[[], bool]) -> None:
        """What `DataFreeDistillation` asks for, to judge replies as they come and to invert while others still train.

        Args:
            take: gets each reply as it arrives, and gives what is kept of it.
            idle: called while no reply is there; returns whether there was anything to do.
        """
        self.take, self.idle = take, idle

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull one by one until all have answered or `timeout` seconds have passed; None waits for ever.

        Replies that came in time while `idle` was busy are still taken.
        """
        messages = list(messages)
        if not messages:
            return []
        kind, total = messages[0].metadata.message_type, len(messages)
        waiting = [each for each in self.grid.push_messages(messages) if each]
        replies: list[Message] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        with Bar(f"waiting for {kind} replies", total, unit="reply") as bar:
            while waiting:
                bar.at(len(replies))
                began = time.monotonic()
                late = deadline is not None and time.monotonic() >= deadline
                arrived = [each for each in waiting if self._take(each, replies, bar)]
                waiting = [each for each in waiting if each not in arrived]
                if late:
                    break
                if waiting and not arrived and not self.idle():
                    time.sleep(max(self.interval, BUSY * (time.monotonic() - began)))
        return replies

    def _take(self, asked: str, replies: list[Message], bar: Bar) -> bool:
        """Pull the reply to one message; whether it was there."""
        for message in pull(self.grid, asked):
            if self.on_reply is not None:
                self.on_reply(message)
            replies.append(self.take(message))
            bar.at(len(replies))
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
