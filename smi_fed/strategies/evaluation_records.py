"""What travels between client and server for an evaluation; `records` has what training needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from smi_fed.checks import is_integer
from smi_fed.strategies.evaluation import Counts, Measured
from smi_fed.strategies.records import (
    ARRAYS,
    METRICS,
    MODEL,
    NAME,
    NUM_EXAMPLES,
    SCHEMA,
    SCHEMA_VERSION,
    BadReplyError,
    clean_name,
    require_schema,
)

CONFIG = "config"
STUDENT_RIGHT, OWN_RIGHT = "student-right", "own-right"
KEYS = {"images": NUM_EXAMPLES, "student": STUDENT_RIGHT, "own": OWN_RIGHT}
"""Of the parts of `Counts`; `BY_CLASS` before one of them means a list, one number for each class of the student."""
BY_CLASS = "class-"


def pack_question(server_round: int, arrays: ArrayRecord) -> RecordDict:
    """What a client is asked: the round, and the student's weights."""
    return RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"server-round": server_round})})


def pack_evaluation(measured: Measured) -> RecordDict:
    """A client's reply."""
    numbers: dict[str, Any] = {key: values[0] for key, values in _listed([measured.total]).items()}
    if measured.classes is not None:
        numbers |= {f"{BY_CLASS}{key}": values for key, values in _listed(measured.classes).items()}
    who = ConfigRecord({SCHEMA: SCHEMA_VERSION, NAME: measured.name})
    return RecordDict({METRICS: MetricRecord(numbers), MODEL: who})


def _listed(counts: Sequence[Counts]) -> dict[str, list[int]]:
    """Each key's numbers; without those of own models where there is none."""
    found = {key: [getattr(each, part) for each in counts] for part, key in KEYS.items()}
    return {key: values for key, values in found.items() if None not in values}


def read_evaluation(content: RecordDict, classes: int, most: int) -> Measured:
    """What a client says that it counted, where it can be true.

    Args:
        classes: of the student.
        most: images that a client may claim.

    Raises:
        BadReplyError: records, keys or numbers that cannot be, by their keys.
    """
    metrics, who = content.get(METRICS), content.get(MODEL)
    if not (isinstance(metrics, MetricRecord) and isinstance(who, ConfigRecord)):
        raise BadReplyError(
            f"the reply has no numbers {METRICS!r} with {MODEL!r} beside them; it has {sorted(content)}"
        )
    require_schema(who)
    total = _counts({key: metrics[key] for key in KEYS.values() if key in metrics}, most)
    lists = {key: metrics[f"{BY_CLASS}{key}"] for key in KEYS.values() if f"{BY_CLASS}{key}" in metrics}
    rows = _rows(lists, classes, most) if lists else None
    if rows is not None and (together := _together(rows)) != total:
        raise BadReplyError(f"counts by class add up to {together}, but all together are {total}")
    return Measured(clean_name(str(who.get(NAME, ""))), total, rows)


def _rows(lists: Mapping[str, Any], classes: int, most: int) -> tuple[Counts, ...]:
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != classes:
            got = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
            raise BadReplyError(f"{BY_CLASS}{key} is {got}, expected one for each of {classes} classes")
    return tuple(_counts(dict(zip(lists, row, strict=True)), most) for row in zip(*lists.values(), strict=True))


def _counts(numbers: Mapping[str, Any], most: int) -> Counts:
    images: Any = numbers.get(NUM_EXAMPLES)
    if not is_integer(images) or not 0 <= images <= most:
        raise BadReplyError(f"{NUM_EXAMPLES} is {images!r}, expected an int from 0 to {most}")
    for key in (STUDENT_RIGHT, *numbers):
        right: Any = numbers.get(key)
        if not is_integer(right) or not 0 <= right <= images:
            raise BadReplyError(f"{key} is {right!r}, expected an int from 0 to {images}, the images")
    return Counts(**{part: numbers[key] for part, key in KEYS.items() if key in numbers})


def _together(rows: Sequence[Counts]) -> Counts:
    own = [each.own for each in rows if each.own is not None]
    images, student = sum(each.images for each in rows), sum(each.student for each in rows)
    return Counts(images, student, sum(own) if own else None)
