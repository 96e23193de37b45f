"""A reply whose pieces do not fit costs its own node its contribution, and no reply passes for another node's."""

import pytest
from flwr.app import ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from simulations.local_grid import InProcessGrid
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.strategies.test_data_free import NODES, client, start, strategy

HOSTILE = 22


class Pieces(InProcessGrid):
    """Puts each reply together from its pieces, as Flower's HttpGrid does, after node 22 changed its own."""

    def __init__(self, change):
        super().__init__(client, NODES)
        self.change = change

    def pull_messages(self, message_ids):
        found = []
        for reply in super().pull_messages(message_ids):
            pieces = {key: each.deflate() for key, each in get_all_nested_objects(reply).items()}
            if reply.metadata.src_node_id == HOSTILE:
                self.change(reply, pieces)
            found.append(inflate_object_from_contents(reply.object_id, pieces))
        return found


def of(pieces, kind):
    return next(key for key, piece in pieces.items() if piece.startswith(kind.encode() + b" "))


def no_json(_, pieces):
    pieces[of(pieces, "Array")] = pieces[of(pieces, "Array")][:-1]


def no_such_kind(_, pieces):
    pieces[of(pieces, "RecordDict")] = pieces[of(pieces, "RecordDict")].replace(b"RecordDict", b"Pickle", 1)


def missing(_, pieces):
    del pieces[of(pieces, "ConfigRecord")]


def no_records(reply, pieces):
    other = ConfigRecord({"x": 1})
    head = pieces[reply.object_id].replace(of(pieces, "RecordDict").encode(), other.object_id.encode())
    pieces[reply.object_id], pieces[other.object_id] = head, other.deflate()


def half_a_character(_, pieces):
    body = pieces[of(pieces, "RecordDict")]
    pieces[of(pieces, "RecordDict")] = body.replace(b'"metrics"', rb'"\ud800"')


@pytest.mark.parametrize("change", [no_json, no_such_kind, missing, no_records, half_a_character])
def test_pieces_that_do_not_fit_are_a_failure_of_their_node(change):
    wrapped = strategy()
    start(wrapped, WatchingGrid(Pieces(change), interval=0.01))
    reasons = {verdict.node: verdict.reason for verdict in wrapped.rounds[0].verdicts}
    assert reasons.pop(HOSTILE).startswith("client failed: its reply cannot be put together: ")
    assert reasons == {11: "", 33: ""}


def test_a_reply_is_its_own_nodes_whatever_it_says():
    def pretends(reply, pieces):
        reply.metadata.__dict__["_reply_to_message_id"] = "x"
        reply.metadata.__dict__["_src_node_id"] = 11
        pieces[reply.object_id] = Message.deflate(reply)

    wrapped = strategy()
    start(wrapped, WatchingGrid(Pieces(pretends), interval=0.01))
    names = {verdict.node: verdict.called for verdict in wrapped.rounds[0].verdicts}
    assert names == {11: "client 0", 22: "client 1", 33: "client 2"}
