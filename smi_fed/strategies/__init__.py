"""Flower strategies; with `server` and `clients` the only code that imports flwr."""

from smi_fed.strategies.admission import AdmissionPolicy
from smi_fed.strategies.core import RoundRecord, TooFewTeachersError
from smi_fed.strategies.data_free import DataFreeDistillation

__all__ = ["AdmissionPolicy", "DataFreeDistillation", "RoundRecord", "TooFewTeachersError"]
