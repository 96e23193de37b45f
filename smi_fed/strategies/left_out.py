"""Weights that need not travel, since the server has the same: what models start from, and what it sent; by digests."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from flwr.app import Array, RecordDict

from smi_fed.checks import SettingError
from smi_fed.models import Classifier, ModelSpec, build_model
from smi_fed.starts import start_of
from smi_fed.strategies.records import BadReplyError, Claim, digests, sendable

log = logging.getLogger("smi_fed")


def start_weights(specs: Sequence[ModelSpec], student: Classifier) -> dict[bytes, Array]:
    """All weights that models of `specs` start from, by `digests`; the same ones of several models are there once.

    A start that is neither on this machine nor on a hub in reach is passed over, which the log says.

    Args:
        student: what was built of its own spec, so that this one is not built again.
    """
    found: dict[bytes, Array] = {}
    for model in _models(specs, student):
        weights = {key: sendable(weight) for key, weight in model.state_dict().items()}
        for key, digest in digests(weights).items():
            if digest not in found:
                found[digest] = Array(weights[key].contiguous())
    return found


def _models(specs: Sequence[ModelSpec], student: Classifier) -> Iterator[Classifier]:
    """A model of each different spec that has a start, at that start."""
    for spec in {repr(spec): spec for spec in specs if start_of(spec) != "random"}.values():
        if spec == student.spec:
            yield student
            continue
        try:
            with torch.random.fork_rng(devices=[]):  # a head's random start is nobody's draw
                model = build_model(spec)
        except SettingError as error:
            log.info("%s travels whole, since what it starts from is not on this machine: %s", spec.name, error)
            continue
        yield model


def sent_weights(questions: Iterable[RecordDict]) -> dict[bytes, Array]:
    """All weights in what clients are asked, by `digests`; nothing is copied."""
    found: dict[bytes, Array] = {}
    for record in {id(record): record for each in questions for record in each.array_records.values()}.values():
        names = digests(record.to_torch_state_dict())
        found |= {names[key]: array for key, array in record.items()}
    return found


def put_back(claim: Claim, known: Mapping[bytes, Array]) -> dict[str, Array]:
    """The arrays of a claim, with the server's own in the place of those that were left out; nothing is copied.

    Args:
        known: what `start_weights` and `sent_weights` gave.

    Raises:
        BadReplyError: a weight is left out that the server has not, or that is there; by its name.
    """
    arrays = dict(claim.arrays)
    for key, digest in claim.left_out.items():
        own = known.get(digest) if isinstance(digest, bytes) else None
        if own is None:
            shown = f"sha256 {digest.hex()[:16]}" if isinstance(digest, bytes) else type(digest).__name__
            raise BadReplyError(f"{key} is left out, and the server has no such weights ({shown})")
        if key in arrays:
            raise BadReplyError(f"{key} is there, although it is said to be left out")
        arrays[key] = own
    return arrays
