"""The student's last head, out of what it sees in the clients' images: one more message after the last round.

What a student has learned from synthetic images is better in its features than in its head,
since synthetic images are not where real ones are. So every client shows its images once to the
finished student and sends class statistics (`smi_fed.class_statistics`); the head becomes their
linear discriminant. FedCGS (Guan et al., AAAI 2025) does this with a frozen backbone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from smi_fed.class_statistics import ClassStatistics, capped, discriminant, merged, put_head
from smi_fed.models import Classifier
from smi_fed.policy import AdmissionPolicy
from smi_fed.strategies.admission import read_class_statistics
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.beginning import NoStartError
from smi_fed.strategies.evaluation_records import pack_question
from smi_fed.strategies.records import (
    CLASS_STATISTICS,
    MODEL,
    NAME,
    SCHEMA,
    SCHEMA_VERSION,
    BadReplyError,
    clean_name,
    failure_of,
    require_schema,
)
from smi_fed.strategies.watching_grid import busy

log = logging.getLogger("smi_fed")

ACTION = "class_statistics"
QUESTION = f"{MessageType.QUERY}.{ACTION}"


@dataclass(frozen=True)
class Finish:
    """What came of the last message.

    Attributes:
        clients: names of those whose statistics are in the head.
        missing: of every other node why not, by name.
    """

    clients: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def pack_answer(name: str, known: ClassStatistics | None) -> RecordDict:
    """A client's reply; None where it may send nothing."""
    sums = ArrayRecord() if known is None else ArrayRecord(dict(vars(known)))
    return RecordDict({CLASS_STATISTICS: sums, MODEL: ConfigRecord({SCHEMA: SCHEMA_VERSION, NAME: name})})


def finish(
    student: Classifier, grid: Grid, server_round: int, policy: AdmissionPolicy, timeout: float | None = None
) -> Finish:
    """Give `student`, in place, the discriminant of what it sees in the images of every connected node.

    Nobody can have sums of more images than `policy.max_examples`, and nobody weighs more than
    `policy.max_claim_ratio` times the median client.

    Args:
        server_round: that the student comes out of.
        timeout: seconds to wait for the answers; None waits for ever.

    Raises:
        NoStartError: no node sent class statistics; the message has every node's reason.
        SettingError: a student without one linear head.
    """
    expected = Expectation.with_features(student)
    arrays = arrays_of(student)
    late = busy(grid)
    nodes = sorted(set(grid.get_node_ids()) - late)
    asked = [Message(pack_question(server_round, arrays), node, QUESTION) for node in nodes]
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(asked, timeout=timeout)}
    known, missing = dict[str, ClassStatistics](), {f"node {node}": "still at work on its training" for node in late}
    for question in asked:
        node = question.metadata.dst_node_id
        try:
            name, sums = _read(replies.get(question.metadata.message_id), expected, policy)
            name = name if name and name not in known else f"{name or 'node'} ({node})"
            known[name] = sums
        except BadReplyError as error:
            missing[f"node {node}"] = str(error)
            log.warning("node %d is not in the student's head: %s", node, error)
    if not known:
        raise NoStartError(
            f"finish: statistics needs the class statistics of a client; {missing or 'no node is there'}"
        )
    put_head(student, discriminant(merged(_weighed(list(known.values()), policy))))
    log.info("the student's head is the discriminant of what it sees in the images of %d clients", len(known))
    return Finish(tuple(known), missing)


def arrays_of(model: Classifier) -> ArrayRecord:
    """A model's weights as they travel."""
    return ArrayRecord({key: value.cpu() for key, value in model.state_dict().items()})  # type: ignore[arg-type]


def _read(reply: Message | None, expected: Expectation, policy: AdmissionPolicy) -> tuple[str, ClassStatistics]:
    """A node's name and sums; raises BadReplyError, saying why there are none."""
    if reply is None or reply.has_error():
        raise BadReplyError(failure_of(reply))
    who, sums = reply.content.get(MODEL), reply.content.get(CLASS_STATISTICS)
    if not (isinstance(who, ConfigRecord) and isinstance(sums, ArrayRecord)):
        raise BadReplyError(f"the reply has no arrays {CLASS_STATISTICS!r} with {MODEL!r} beside them")
    require_schema(who)
    if not sums:
        raise BadReplyError("it has no class of client.minimum_examples images")
    classes = range(expected.student.num_classes)
    most = policy.max_examples
    known = read_class_statistics(sums, most, expected, classes, (most,) * len(classes))
    if not known.counts.sum():
        raise BadReplyError("its class statistics are of no image")
    return clean_name(str(who.get(NAME, ""))), known


def _weighed(known: Sequence[ClassStatistics], policy: AdmissionPolicy) -> list[ClassStatistics]:
    """The same, each of at most so many images as the policy's ratio to the median lets it have."""
    most = policy.max_claim_ratio * median_low(float(part.counts.sum()) for part in known)
    return [capped(part, most) for part in known]
