"""A reply out of the pieces in which Flower carries it; a node chooses every byte of them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from google.protobuf.message import DecodeError

PUZZLED = (
    ArithmeticError, AttributeError, DecodeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What Flower raises on pieces that do not fit; a SuperLink out of reach raises httpx's own errors."""


def pull(grid: Grid, asked: str) -> Iterable[Message]:
    """The reply to the message of that id, if it is there.

    Where Flower cannot put it together a failure stands in its place, since raised here the error of one node would
    end the run of all. A reply is to the question for which the SuperLink gave it, whatever it says itself: it cannot
    pass for another node's.
    """
    try:
        return [_checked(reply, asked) for reply in grid.pull_messages([asked])]
    except PUZZLED as error:
        reason = f"its reply cannot be put together: {type(error).__name__}: {error}"
        about = Metadata(0, "", 0, 0, asked, "", time.time(), 0, SYSTEM_MESSAGE_TYPE)
        return [make_message(about, error=Error(ErrorCode.UNKNOWN, reason))]


def _checked(reply: Message, asked: str) -> Message:
    if not reply.has_error():
        if not isinstance(reply.content, RecordDict):
            raise TypeError(f"its content is {type(reply.content).__name__}, expected RecordDict")
        for name, record in reply.content.items():
            "".join([name, *record]).encode()  # half a character would be no name anywhere else
    reply.metadata.__dict__["_reply_to_message_id"] = asked
    return reply
