"""What travels between client and server; the only place that knows key names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from smi_fed.checks import is_integer, is_number
from smi_fed.class_statistics import ClassStatistics
from smi_fed.files import checksums
from smi_fed.inversion import FeatureStatistics
from smi_fed.models import ModelSpec, architecture_of
from smi_fed.strategies.shown import BadReplyError, clean_name, failed

SCHEMA_VERSION = 1

ARRAYS = "arrays"
METRICS = "metrics"
STATISTICS = "statistics"
CLASS_STATISTICS = "class-statistics"
MODEL = "smi-fed.model"
LEFT_OUT = "smi-fed.left-out"
"""Weights that do not travel: the digest of each by its name."""

KNOWN = "smi-fed.known"
"""In the question's configuration: digests of weights that the server has."""

SCHEMA = "schema"
SPEC = "spec"
NAME = "name"
NUM_EXAMPLES = "num-examples"
LABEL_COUNTS = "label-counts"
TRAIN_LOSS = "train_loss"
"""Spelt as Flower's QFedAvg wants it."""


SPEC_METRIC, SCHEMA_METRIC, NAME_METRIC = "smi-fed.spec", "smi-fed.schema", "smi-fed.name"
"""Flower's older API has one dict of scalars for all of these."""

OWN_METRICS = (NUM_EXAMPLES, LABEL_COUNTS, TRAIN_LOSS)


LARGEST_LOSS = 1e6


@dataclass(frozen=True)
class Claim:
    """What a reply says of itself, read but not yet believed.

    Attributes:
        spec: JSON text.
        name: how the client calls itself (its partition, say).
        arrays: weights as they came, not decoded.
        statistics: arrays of the feature statistics, empty if not sent.
        num_examples, train_loss, label_counts: claimed.
        metrics: every other finite number that the client sent, for the inner strategy.
        class_statistics: arrays of the class statistics, empty if not sent.
        left_out: what it says in place of a digest, for each weight that the server shall have.
    """

    spec: str
    name: str
    arrays: Mapping[str, Array]
    statistics: Mapping[str, Array]
    num_examples: float
    train_loss: float
    label_counts: tuple[int, ...] | None
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    class_statistics: Mapping[str, Array] = field(default_factory=dict)
    left_out: Mapping[str, Any] = field(default_factory=dict)


def pack_reply(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    num_examples: int,
    train_loss: float,
    name: str = "",
    label_counts: list[int] | None = None,
    statistics: FeatureStatistics | None = None,
    class_statistics: ClassStatistics | None = None,
    known: Collection[bytes] = (),
) -> RecordDict:
    """A client's reply.

    Args:
        spec: what the weights are of; its architecture alone is told, not what it starts from.
        weights: state dict of a `Classifier` or of a plain timm model, see `sendable`.
        num_examples, train_loss: of the training.
        name: how the client wants to be called in reports; the node's id where empty.
        label_counts: examples per class; without them the server assumes as many of each.
        statistics: for the feature-statistics prior.
        class_statistics: of the student that came, for `strategy.start=statistics`.
        known: what `read_known` found in the question; weights with these digests are named and do not travel.
    """
    sent = {key: sendable(value) for key, value in weights.items()}
    left = {key: digest for key, digest in digests(sent).items() if digest in known} if known else {}
    metrics: dict[str, int | float | list[int]] = {NUM_EXAMPLES: num_examples, TRAIN_LOSS: train_loss}
    if label_counts is not None:
        metrics[LABEL_COUNTS] = label_counts
    content = RecordDict(
        {
            ARRAYS: ArrayRecord({key: value for key, value in sent.items() if key not in left}),
            METRICS: MetricRecord(metrics),  # type: ignore[arg-type]
            MODEL: ConfigRecord({SCHEMA: SCHEMA_VERSION, SPEC: architecture_of(spec).to_json(), NAME: name}),
        }
    )
    if statistics is not None:
        content[STATISTICS] = pack_statistics(statistics)
    if class_statistics is not None:
        content[CLASS_STATISTICS] = ArrayRecord(dict(vars(class_statistics)))
    if left:
        content[LEFT_OUT] = ConfigRecord(left)  # type: ignore[arg-type]
    return content


def sendable(weight: Tensor) -> Tensor:
    """A weight as it travels: on the CPU, and in float32 where it has less.

    The server builds every model in float32, and numpy knows no bfloat16.
    """
    weight = weight.detach().cpu()
    return weight.float() if weight.is_floating_point() and weight.element_size() < 4 else weight


def digests(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """SHA-256 of each CPU tensor's dtype, shape and bytes; 32 bytes each."""
    sums = checksums(weights, {})
    return {key: bytes.fromhex(sums[key]) for key in weights}


def read_known(content: RecordDict) -> frozenset[bytes]:
    """The digests of weights that the server has, from what a client was asked; empty where it does not say so.

    They are those that it names, and those of the student that it sends.
    """
    config = next(iter(content.config_records.values()), ConfigRecord())
    if KNOWN not in config:
        return frozenset()
    sent = (digests(record.to_torch_state_dict()).values() for record in content.array_records.values())
    return frozenset(config[KNOWN]).union(*sent)  # type: ignore[arg-type]


def size_of(content: RecordDict) -> int:
    """Bytes of a message's records: arrays as they are packed with their names, and all others as protobuf has them."""
    arrays = content.array_records
    rest = RecordDict({key: record for key, record in content.items() if key not in arrays})
    return sum(record.count_bytes() for record in arrays.values()) + recorddict_to_proto(rest).ByteSize()


def pack_statistics(statistics: FeatureStatistics) -> ArrayRecord:
    """Feature statistics as arrays mean.0, std.0, mean.1, ... and examples."""
    arrays = {f"mean.{i}": mean.cpu() for i, mean in enumerate(statistics.mean)}
    arrays |= {f"std.{i}": std.cpu() for i, std in enumerate(statistics.std)}
    return ArrayRecord(arrays | {"examples": torch.tensor(statistics.examples)})  # type: ignore[arg-type]


def pack_fit(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    name: str,
    num_examples: int,
    train_loss: float,
    label_counts: list[int] | None = None,
    statistics: FeatureStatistics | None = None,
    class_statistics: ClassStatistics | None = None,
) -> tuple[list[NDArray[Any]], int, dict[str, bool | bytes | float | int | str]]:
    """What a client of Flower's older API returns from `NumPyClient.fit`."""
    metrics: dict[str, bool | bytes | float | int | str] = {
        SPEC_METRIC: architecture_of(spec).to_json(), SCHEMA_METRIC: SCHEMA_VERSION, NAME_METRIC: name,
        TRAIN_LOSS: train_loss,
    }  # fmt: skip
    if label_counts is not None:
        metrics[LABEL_COUNTS] = json.dumps(label_counts)
    if statistics is not None:
        metrics[STATISTICS] = save({key: array_tensor(a) for key, a in pack_statistics(statistics).items()})
    if class_statistics is not None:
        metrics[CLASS_STATISTICS] = save(dict(vars(class_statistics)))
    return [sendable(value).numpy() for value in weights.values()], num_examples, metrics


def array_tensor(array: Array) -> Tensor:
    """The tensor in an array that this process made."""
    return torch.from_numpy(array.numpy().copy())


def read_fit(metrics: Mapping[str, Any], num_examples: int, arrays: Mapping[str, Array]) -> Claim:
    """What a reply of Flower's older API claims; raises as `read_reply`."""
    own = {SPEC_METRIC, SCHEMA_METRIC, NAME_METRIC, LABEL_COUNTS, STATISTICS, CLASS_STATISTICS}
    numbers = {key: value for key, value in metrics.items() if key not in own and is_number(value)}
    try:
        counts = json.loads(metrics[LABEL_COUNTS]) if LABEL_COUNTS in metrics else None
        both = (load(metrics[key]) if key in metrics else {} for key in (STATISTICS, CLASS_STATISTICS))
        statistics, sums = ({key: Array(tensor.numpy()) for key, tensor in each.items()} for each in both)
    except (TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise BadReplyError(f"{LABEL_COUNTS} or statistics cannot be read: {error}") from error
    content = RecordDict({
        ARRAYS: ArrayRecord(dict(arrays)),
        METRICS: MetricRecord({**numbers, NUM_EXAMPLES: num_examples}),
        MODEL: ConfigRecord({
            SCHEMA: metrics.get(SCHEMA_METRIC, 0), SPEC: str(metrics.get(SPEC_METRIC, "")),
            NAME: str(metrics.get(NAME_METRIC, "")),
        }),
    })  # fmt: skip
    claim = read_reply(content)
    if counts is not None and not (isinstance(counts, list) and all(is_integer(count) for count in counts)):
        raise BadReplyError(f"{LABEL_COUNTS} is {counts!r}, expected a list of ints")
    return replace(
        claim,
        label_counts=None if counts is None else tuple(counts),
        statistics=statistics,
        class_statistics=sums,
    )


def read_reply(content: RecordDict) -> Claim:
    """What a reply claims.

    Raises:
        BadReplyError: records or keys are missing, or the schema version is unknown (both are named).
    """
    for key in (ARRAYS, METRICS, MODEL):
        if key not in content:
            raise BadReplyError(f"the reply has no record {key!r}; it has {sorted(content)}")
    arrays, metrics, model = content[ARRAYS], content[METRICS], content[MODEL]
    statistics, sums = (content.get(key, ArrayRecord()) for key in (STATISTICS, CLASS_STATISTICS))
    if not (isinstance(arrays, ArrayRecord) and isinstance(metrics, MetricRecord) and isinstance(model, ConfigRecord)):
        raise BadReplyError("the reply's records are not of the expected kinds")
    if not isinstance(statistics, ArrayRecord) or not isinstance(sums, ArrayRecord):
        raise BadReplyError(f"the record {STATISTICS!r} or {CLASS_STATISTICS!r} is not of arrays")
    left = content.get(LEFT_OUT, ConfigRecord())
    if not isinstance(left, ConfigRecord):
        raise BadReplyError(f"the record {LEFT_OUT!r} is not of digests")
    require_schema(model)
    num_examples, loss, counts = metrics.get(NUM_EXAMPLES), metrics.get(TRAIN_LOSS, 0.0), metrics.get(LABEL_COUNTS)
    for key, value in ((NUM_EXAMPLES, num_examples), (TRAIN_LOSS, loss)):
        if not is_number(value):
            raise BadReplyError(f"{key} is {value!r}, expected a finite number")
    assert isinstance(num_examples, int | float)
    assert isinstance(loss, int | float)
    if not 0 <= loss <= LARGEST_LOSS:
        raise BadReplyError(
            f"{TRAIN_LOSS} is {loss!r}, expected a number from 0 to {LARGEST_LOSS:g}: QFedAvg takes its power"
        )
    if counts is not None and not (isinstance(counts, list) and all(isinstance(c, int) for c in counts)):
        raise BadReplyError(f"{LABEL_COUNTS} is {counts!r}, expected a list of ints")
    return Claim(
        spec=str(model.get(SPEC, "")),
        name=clean_name(str(model.get(NAME, ""))),
        arrays=arrays,
        statistics=statistics,
        num_examples=num_examples,
        train_loss=float(loss),
        label_counts=None if counts is None else tuple(int(c) for c in counts),
        metrics={
            k: v for k, v in metrics.items() if k not in OWN_METRICS and isinstance(v, int | float) and is_number(v)
        },
        class_statistics=sums,
        left_out=left,
    )


def failure_of(reply: Message | None) -> str:
    """Why a node that was asked gave nothing to read; empty where it did."""
    if reply is None:
        return "no reply in time"
    if not reply.has_error():
        return ""
    return f"{failed(reply.error.reason)} (code {reply.error.code})"


def require_schema(who: ConfigRecord) -> None:
    """Raise BadReplyError for a reply of a schema that is not known; both versions are named."""
    if who.get(SCHEMA) != SCHEMA_VERSION:
        raise BadReplyError(f"the reply's schema version is {who.get(SCHEMA)!r}, this server reads {SCHEMA_VERSION}")


def projected_reply(
    arrays: Mapping[str, Array], num_examples: int, train_loss: float, metrics: Mapping[str, int | float]
) -> RecordDict:
    """A reply in the student's space, as every built-in strategy expects it."""
    numbers = {**metrics, NUM_EXAMPLES: num_examples, TRAIN_LOSS: train_loss}
    return RecordDict({ARRAYS: ArrayRecord(dict(arrays)), METRICS: MetricRecord(numbers)})  # type: ignore[arg-type]
