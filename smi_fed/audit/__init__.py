"""What somebody who holds a model, its synthetic images or its student can tell about its training data."""

from smi_fed.audit.findings import Audit, audited, judged
from smi_fed.audit.lira import Leak, confidences, leak_of, likelihood_ratios
from smi_fed.audit.local_privacy import LocalPrivacy, release
from smi_fed.audit.nearest import Nearness, nearness
from smi_fed.audit.worlds import HELD_BY, AuditConfig, Recipe, World, marked, world

__all__ = [
    "HELD_BY",
    "Audit",
    "AuditConfig",
    "Leak",
    "LocalPrivacy",
    "Nearness",
    "Recipe",
    "World",
    "audited",
    "confidences",
    "judged",
    "leak_of",
    "likelihood_ratios",
    "marked",
    "nearness",
    "release",
    "world",
]
