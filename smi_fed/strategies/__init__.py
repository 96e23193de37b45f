"""Flower strategies; with `server` and `clients` the only code that imports flwr."""

from smi_fed.policy import AdmissionPolicy
from smi_fed.strategies.beginning import NoStartError
from smi_fed.strategies.data_free import DataFreeDistillation
from smi_fed.strategies.federated_evaluation import FederatedEvaluation
from smi_fed.strategies.legacy import LegacyDataFreeDistillation
from smi_fed.strategies.round_record import RoundRecord, TooFewTeachersError, UnsoundStudentError
from smi_fed.strategies.watching_grid import WatchingGrid
from smi_fed.waiting import WaitingConfig

__all__ = [
    "AdmissionPolicy",
    "DataFreeDistillation",
    "FederatedEvaluation",
    "LegacyDataFreeDistillation",
    "NoStartError",
    "RoundRecord",
    "TooFewTeachersError",
    "UnsoundStudentError",
    "WaitingConfig",
    "WatchingGrid",
]
