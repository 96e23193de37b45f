"""What a door is, and how many cases go through it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from smi_fed.strategies.records import BadReplyError

MEBIBYTE = 2**20


class Refused(Exception):  # noqa: N818  (an outcome, not an error)
    """The door refused by a reason that it keeps, and raised nothing."""


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        size: bytes of what came.
        enter: hands it to the library; returns when it is let in and what was let in is sound, raises one of the
            door's refusals, or anything else, which is a fault.
    """

    size: int
    enter: Callable[[], object]


@dataclass(frozen=True)
class Door:
    """An entrance of what a client sends, or of a file.

    Attributes:
        what: it reads.
        make: a case; everything random in it is the generator's.
        share: of 10,000 cases.
        refusals: what it may raise, and nothing else.
        memory: bytes that a case may take beyond `factor` times its own size.
        seconds: that a case may take.
    """

    name: str
    what: str
    make: Callable[[Random], Case]
    share: float
    refusals: tuple[type[Exception], ...] = (BadReplyError, Refused)
    memory: int = 16 * MEBIBYTE
    factor: int = 16
    seconds: float = 5.0


def require_printable(text: str, most: int) -> None:
    """A text that may be shown: one line of at most `most` characters, none of which steers a terminal or a reader."""
    assert text.isprintable(), ascii(text)[:200]
    assert len(text) <= most, len(text)
