"""Teachers that the others' images speak against, where `distillation.robust` asks for agreement."""

from __future__ import annotations

import logging
from dataclasses import replace

from smi_fed.checks import require
from smi_fed.distillation import Agreement, Joining
from smi_fed.events import Events
from smi_fed.pipeline import opinions_of
from smi_fed.strategies.round_record import RoundRecord

log = logging.getLogger("smi_fed")


def check(robust: Joining, projection: str) -> None:
    """Raise SettingError for agreement where each update may depend on its own reply alone."""
    ok = projection == "ensemble" or not isinstance(robust, Agreement)
    require(ok, "distillation.robust.kind", "agreement", f"mean | median | trimmed, where projection is {projection}")


def judge(record: RoundRecord, robust: Joining, events: Events) -> None:
    """Put an opinion into the verdict of each teacher of a round; who is doubted is told by name, with the reason."""
    if not isinstance(robust, Agreement) or not record.stored:
        return
    found = iter(opinions_of(record.teachers, record.stored, robust))
    record.verdicts = [
        replace(verdict, opinion=next(found)) if verdict.admitted else verdict for verdict in record.verdicts
    ]
    for verdict in record.admitted:
        opinion, doubted = verdict.opinion, bool(verdict.opinion.reason)
        about = {"factor": opinion.factor, "agreement": opinion.agreement, "reason": opinion.reason}
        known = {key: value for key, value in about.items() if value not in (None, "")}
        events.tell("agreement", "doubted" if doubted else "kept", verdict.called, **known)
        if doubted:
            log.warning("%s: %s", verdict.called, opinion.reason)
