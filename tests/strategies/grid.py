"""A Flower grid in this process: real messages through protobuf, clients called one by one."""

import uuid

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

SUPERLINK = 1


class InProcessGrid(Grid):
    """Hands each message to `client(message, context)`; what it raises becomes an error reply.

    Args:
        client: a ClientApp or any function of (message, context).
        nodes: node id to node config.
        run_config: of every context.
        silent: nodes that never answer.
        lost: nodes for which the SuperLink answers with an error.
    """

    def __init__(self, client, nodes, run_config=None, silent=(), lost=()):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK, 1
        self.client, self.nodes, self.run_config = client, dict(nodes), dict(run_config or {})
        self.silent, self.lost = set(silent), set(lost)
        self.replies = {}
        self.states = {node: RecordDict() for node in self.nodes}  # as a SuperNode keeps them between rounds

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._deliver(message) for message in messages]

    def _deliver(self, message):
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        asked = message.metadata.message_id
        node = message.metadata.dst_node_id
        delivered = message_from_proto(message_to_proto(message))
        if node in self.lost:
            reply = Message(Error(5, "node unavailable"), reply_to=delivered)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            self.replies[asked] = reply
        elif node not in self.silent:
            context = Context(1, node, self.nodes[node], self.states[node], self.run_config)
            try:
                reply = self.client(delivered, context)
            except Exception as error:
                reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=delivered)
            self.replies[asked] = message_from_proto(message_to_proto(reply))
        return asked

    def pull_messages(self, message_ids):
        return [self.replies.pop(each) for each in list(message_ids) if each in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError
