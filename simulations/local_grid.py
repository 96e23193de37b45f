"""A Flower grid in this process: real messages through protobuf, clients called one by one."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from smi_fed.config import Settings, join_overrides

if TYPE_CHECKING:
    from server.run import FederatedRun

SUPERLINK = 1


class InProcessGrid(Grid):
    """Hands each message to `client(message, context)`; what it raises becomes an error reply.

    A client works when its reply is pulled, so that the replies of many clients are never there at once.

    Args:
        client: a ClientApp or any function of (message, context).
        nodes: node id to node config.
        run_config: of every context.
        silent: nodes that never answer.
        lost: nodes for which the SuperLink answers with an error.
    """

    def __init__(
        self,
        client: Callable[[Message, Context], Message],
        nodes: Mapping[int, Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
        silent: Collection[int] = (),
        lost: Collection[int] = (),
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK, 1
        self.client, self.nodes, self.run_config = client, dict(nodes), dict(run_config or {})
        self.silent, self.lost = set(silent), set(lost)
        self.asked: dict[str, Message] = {}
        self.states = {node: RecordDict() for node in self.nodes}  # as a SuperNode keeps them between rounds

    def get_node_ids(self) -> list[int]:
        """The nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take in messages; their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self.asked[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to messages, made now; each once."""
        pending = [each for each in list(message_ids) if each in self.asked]
        return [self._reply(self.asked.pop(each)) for each in pending if not self._is_silent(each)]

    def _is_silent(self, asked: str) -> bool:
        return self.asked[asked].metadata.dst_node_id in self.silent - self.lost

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        delivered = message_from_proto(message_to_proto(message))
        if node in self.lost:
            reply = Message(Error(5, "node unavailable"), reply_to=delivered)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            return reply
        context = Context(1, node, dict(self.nodes[node]), self.states[node], self.run_config)
        try:
            reply = self.client(delivered, context)
        except Exception as error:  # whatever a client raises
            reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=delivered)
        return message_from_proto(message_to_proto(reply))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """All replies that there will be."""
        return self.pull_messages(self.push_messages(messages))

    def get_nodes(self) -> Any:
        """Not needed here."""
        raise NotImplementedError

    def set_run(self, *args: Any, **kwargs: Any) -> None:
        """Not needed here."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Not needed here."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not needed here."""
        raise NotImplementedError


@contextmanager
def local_run(
    settings: Settings,
    words: Sequence[str],
    clients: int,
    grid: Callable[..., InProcessGrid] | None = None,
    **node: Any,
) -> Iterator[tuple[FederatedRun, InProcessGrid]]:
    """A run of the app in this process, to be executed, and the grid for it; what both write is gone afterwards.

    Clients keep their own models on disk, as on machines of their own: they are no part of the server's memory.

    Args:
        settings: the server's.
        words: overrides, from which clients make the same settings.
        clients: how many there are; numbers `node_id(0)` and on.
        grid: makes it of its client, nodes and run config; `InProcessGrid` where there is none.
        node: of every client's node config.
    """
    from clients.app import app
    from server.run import FederatedRun

    nodes = {node_id(i): {"partition-id": i, "num-partitions": clients, **node} for i in range(clients)}
    with tempfile.TemporaryDirectory(prefix="smi-fed-") as scratch:
        run_config = {"overrides": join_overrides(words), "client-state": f"{scratch}/clients"}
        yield FederatedRun(settings, Path(scratch) / "server"), (grid or InProcessGrid)(app, nodes, run_config)


def node_id(client: int) -> int:
    """Of a client of `local_run`."""
    return 100 + client
