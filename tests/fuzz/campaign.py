"""Many cases through the doors: how many were let in, what refused the others, what the worst one took."""

import math
import platform
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from random import Random

from tests.fuzz.door import Door
from tests.fuzz.measured import Meter

KINDS = 12
"""Most kinds of refusals that a door tells of; the rest is counted together."""


@dataclass(frozen=True)
class Fault:
    """A case that was neither let in nor refused as it should be; `--door` and `--number` make it again."""

    door: str
    seed: int
    number: int
    what: str


@dataclass
class Tally:
    """What came of a door's cases.

    Attributes:
        memory: bytes of the case that took most, beyond `factor` times its size; seconds: of the longest.
    """

    cases: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    memory: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)


def generator(door: Door, seed: int, number: int) -> Random:
    """Of one case, whatever other cases there are."""
    return Random(f"{seed}/{door.name}/{number}")


def enter(door: Door, seed: int, number: int, tally: Tally, meter: Meter) -> None:
    """One case; its outcome is added to the tally."""
    case, fault = door.make(generator(door, seed, number)), ""
    with meter as taken:
        try:
            case.enter()
            tally.accepted += 1
        except door.refusals as refusal:
            tally.refused[kind(refusal)] += 1
        except Exception as error:  # what this is all about
            fault = f"{type(error).__name__}: {error}"
    beyond = taken.memory - door.factor * case.size
    tally.cases, tally.memory, tally.seconds = (
        tally.cases + 1, max(tally.memory, beyond), max(tally.seconds, taken.seconds),
    )  # fmt: skip
    if beyond > door.memory:
        fault = fault or f"{taken.memory} bytes for a message of {case.size}"
    if taken.seconds > door.seconds:
        fault = fault or f"{taken.seconds:.1f} seconds"
    if taken.done:
        fault = f"{taken.done[:3]}"
    if fault:
        tally.faults.append(Fault(door.name, seed, number, ascii(fault)[:500]))


def kind(refusal: Exception) -> str:
    """A refusal without what it quotes."""
    text = re.sub(r"^/[^:]*: ", "", str(refusal)[:400])
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]|-?\d[\d.e+-]*", "_", text)
    return ascii(re.split(r"[,;]|: got", text)[0])[1:-1][:60].strip()


def shares(doors: Sequence[Door], cases: int) -> dict[str, int]:
    """Cases of each door: its share of all, at least one."""
    total = sum(door.share for door in doors)
    return {door.name: max(1, math.ceil(cases * door.share / total)) for door in doors}


def run(
    doors: Sequence[Door], cases: int, seed: int, first: int = 0, tell: Callable[[int, list[Fault]], None] | None = None
) -> dict[str, Tally]:
    """At least `cases` cases through `doors`, by their shares; the same seed makes the same cases.

    Args:
        first: number of each door's first case.
        tell: called after each case with how many are done, and all faults.
    """
    meter, found, faults, done = Meter(), {}, list[Fault](), 0
    warnings.simplefilter("ignore")  # they are no outcome
    for door, count in zip(doors, shares(doors, cases).values(), strict=True):
        tally = found[door.name] = Tally()
        for number in range(first, first + count):
            before = len(tally.faults)
            enter(door, seed, number, tally, meter)
            faults += tally.faults[before:]
            done += 1
            if tell is not None:
                tell(done, faults)
    return found


def reasons(tally: Tally) -> dict[str, int]:
    """The most frequent kinds of refusals; all others as one."""
    found = dict(tally.refused.most_common(KINDS))
    rest = sum(tally.refused.values()) - sum(found.values())
    return found | ({"others": rest} if rest else {})


def machine() -> dict[str, str]:
    """What it ran on."""
    packages = {name: version(name) for name in ("flwr", "torch", "timm", "numpy", "safetensors")}
    return {"python": platform.python_version(), "system": platform.platform(), **packages}
