"""What somebody who holds a model, its synthetic images or its student can tell about its training data."""

from smi_fed.audit.lira import Leak, confidences, leak_of, likelihood_ratios
from smi_fed.audit.nearest import Nearness, nearness
from smi_fed.audit.worlds import Audit, AuditConfig, audited

__all__ = [
    "Audit",
    "AuditConfig",
    "Leak",
    "Nearness",
    "audited",
    "confidences",
    "leak_of",
    "likelihood_ratios",
    "nearness",
]
