"""A grid that shows how many replies have arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from smi_fed.progress import Bar


class WatchingGrid(Grid):
    """Passes everything on to another grid; waiting for replies has a progress bar.

    Args:
        grid: the grid that Flower handed to the ServerApp.
        on_reply: called with each reply as it arrives.
        interval: seconds between two looks for replies.
    """

    def __init__(self, grid: Grid, on_reply: Callable[[Message], None] | None = None, interval: float = 0.5) -> None:
        self.grid, self.on_reply, self.interval = grid, on_reply, interval

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until all have answered or `timeout` seconds have passed; None waits for ever."""
        messages = list(messages)
        if not messages:
            return []
        waiting = {each for each in self.grid.push_messages(messages) if each}
        total, replies = len(messages), []
        deadline = None if timeout is None else time.monotonic() + timeout
        with Bar(f"waiting for {messages[0].metadata.message_type} replies", total, unit="reply") as bar:
            while waiting and (deadline is None or time.monotonic() < deadline):
                for message in self.grid.pull_messages(waiting):
                    waiting.discard(message.metadata.reply_to_message_id)
                    replies.append(message)
                    if self.on_reply is not None:
                        self.on_reply(message)
                bar.at(len(replies))
                if waiting:
                    time.sleep(self.interval)
        return replies

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
