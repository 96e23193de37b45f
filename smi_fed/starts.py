"""Where the student starts: what it may be asked for, and what its spec says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from smi_fed.checks import SettingError, require, require_choice
from smi_fed.spec import ModelSpec

Start = Literal["own", "random", "pretrained", "average", "statistics"]
STARTS: tuple[str, ...] = get_args(Start)
FROM_CLIENTS = ("average", "statistics")
"""Those that are made of what clients sent in round 1."""
START_KEYS = ("start", "kwargs.checkpoint_path", "kwargs.pretrained")
"""Those of a spec that say what its model starts from."""


def start_of(spec: ModelSpec) -> str:
    """What a model's weights are at first: random | pretrained (from a hub) | file."""
    if spec.start == "pretrained" or (spec.start is None and spec.kwargs.get("pretrained")):
        return "pretrained"
    return "file" if spec.start or spec.kwargs.get("checkpoint_path") else "random"


def same_architecture(first: ModelSpec, second: ModelSpec) -> bool:
    """Whether both name the same model with the same arguments."""
    return (first.name, first.kwargs) == (second.name, second.kwargs)


@contextmanager
def naming_start(key: str) -> Iterator[None]:
    """Put the key of a spec before an error about what its model starts from, which may lie on another machine."""
    try:
        yield
    except SettingError as error:
        if error.key not in START_KEYS:
            raise
        raise error.under(key) from error


def start_of_client(spec: ModelSpec, student: ModelSpec) -> str:
    """What a client's weights are at first: the student's, if it has that architecture and the student a start."""
    goes_on = start_of(student) != "random" and same_architecture(spec, student)
    return start_of(student if goes_on else spec)


def check_start(start: str, student: ModelSpec, refine: bool) -> None:
    """Refuse a start that the student cannot have.

    Args:
        refine: whether each round distills into what the inner strategy aggregated.

    Raises:
        SettingError: naming what cannot be.
    """
    require_choice("start", start, STARTS)
    own, begins = start_of(student), "pretrained" if start == "random" else "random"
    fits = start not in ("random", "pretrained") or (start == "random") == (own == "random")
    allowed = f"own | {begins} | average | statistics, since model.student.start is {student.start or 'null'}"
    require(fits, "start", start, allowed)
    allowed = "own, where refine is true: the student of each round is what the strategy aggregated"
    require(not refine or start not in FROM_CLIENTS, "start", start, allowed)
