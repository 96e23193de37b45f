"""Hostile variants of Flower's records."""

from random import Random

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from tests.fuzz.mutations import FLOATS, INTS, number, text
from tests.fuzz.payloads import array


def scalar(rng: Random, record):
    """A value that this kind of record can carry."""
    value = rng.choice((number(rng), [number(rng)] * rng.choice((0, 1, 3, 1000)), rng.choice(INTS), rng.choice(FLOATS)))
    if isinstance(record, ConfigRecord) and rng.random() < 0.7:
        texts = (text(rng), text(rng).encode(), [text(rng)] * 3, rng.randbytes(32), rng.random() < 0.5, [b"x"] * 9)
        value = rng.choice(texts)
    return value


def record(rng: Random, known, keys=()):
    """One key of a record changed, taken away, renamed or added."""
    found, change = known.copy(), rng.randrange(5)
    there = list(found)
    key = rng.choice(there) if there and change != 4 else rng.choice((*keys, text(rng)))
    if change == 0 and there:
        del found[key]
    elif change == 1 and there:
        other = rng.choice((text(rng), key.removeprefix("backbone."), f"module.{key}", f"_orig_mod.{key}", key.upper()))
        found[other] = found[key]
        if rng.random() < 0.7:
            del found[key]
    elif isinstance(found, ArrayRecord):
        like = found[rng.choice(there)] if there else Array(np.zeros(3, np.float32))
        found[key] = array(rng, like)
    else:
        found[key] = scalar(rng, found)
    return found


def content(rng: Random, known: RecordDict, keys=(), own=None) -> RecordDict:
    """A message's records with one to three changes.

    `keys` are those that mean something; `own` may change a record in a way of the door's own: it gets the records and
    says whether it did.
    """
    found = RecordDict({name: each.copy() for name, each in known.items()})
    for _ in range(rng.randrange(1, 4)):
        if own is not None and rng.random() < 0.35 and own(rng, found):
            continue
        if not found:
            break
        name, change = rng.choice(list(found)), rng.random()
        if change < 0.85:
            found[name] = record(rng, found[name], keys)
        elif change < 0.9:
            del found[name]
        elif change < 0.95:
            found[name] = rng.choice((ArrayRecord(), MetricRecord({"x": 1}), ConfigRecord({"x": "y"}), found[name]))
        else:
            found[text(rng)] = found.pop(name)
    return found
