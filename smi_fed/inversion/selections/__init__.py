"""Which patches go on when others stop: one file for each way to choose."""

from smi_fed.inversion.selections.attention import attention
from smi_fed.inversion.selections.candidates import Candidates, Selection, best
from smi_fed.inversion.selections.gradient import gradient
from smi_fed.inversion.selections.proportional import proportional
from smi_fed.inversion.selections.random import random
from smi_fed.inversion.selections.stratified import stratified
from smi_fed.inversion.selections.tempered import tempered
from smi_fed.inversion.selections.unsettled import unsettled

SELECTIONS: dict[str, Selection] = {
    "attention": attention,
    "random": random,
    "proportional": proportional,
    "stratified": stratified,
    "gradient": gradient,
    "unsettled": unsettled,
    "tempered": tempered,
}

__all__ = ["SELECTIONS", "Candidates", "Selection", "best"]
