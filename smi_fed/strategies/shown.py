"""What a client says where people read it: in logs, tables, pages and pictures."""

from __future__ import annotations

import re
import unicodedata

from smi_fed.checks import printable


class BadReplyError(ValueError):
    """A reply that is not admitted; the message says why, in one printable line."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def failed(reason: str | None) -> str:
    """What is told of a client that says why it failed."""
    return f"client failed: {printable(str(reason))}"


UNSEEN = "\u115f\u1160\u3164\uffa0"
"""Letters of Hangul that nobody sees."""


def clean_name(name: str) -> str:
    """What of a client's name is printed, logged and drawn: no brackets, so that the server's own stand apart."""
    plain = re.sub(rf"[^\w .,'\u2019&+-]|[{UNSEEN}]", "", unicodedata.normalize("NFC", name[:1000]))
    return re.sub(r" +", " ", plain).strip()[:64].strip()
