"""A student out of teachers and synthetic images: `distill(student, teachers, images, config)`."""

from smi_fed.distillation.agreement import Opinion, opinions
from smi_fed.distillation.config import BY_CERTAINTY, BY_CLASS, ENSEMBLES, DistillationConfig, DistillationRecord
from smi_fed.distillation.ensembles import certainty, ensemble_answers, ensemble_probabilities, ensemble_weights
from smi_fed.distillation.loop import distill
from smi_fed.distillation.robust import Agreement, Joining, Mean, Median, Trimmed
from smi_fed.distillation.shown import coverage, distillation_loss, shown_tokens
from smi_fed.distillation.views import Partners, blend, draw_partners, mix

__all__ = [
    "BY_CERTAINTY",
    "BY_CLASS",
    "ENSEMBLES",
    "Agreement",
    "DistillationConfig",
    "DistillationRecord",
    "Joining",
    "Mean",
    "Median",
    "Opinion",
    "Partners",
    "Trimmed",
    "blend",
    "certainty",
    "coverage",
    "distill",
    "distillation_loss",
    "draw_partners",
    "ensemble_answers",
    "ensemble_probabilities",
    "ensemble_weights",
    "mix",
    "opinions",
    "shown_tokens",
]
