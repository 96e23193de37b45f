"""Images out of a trained model: `invert(model, targets, config)`."""

from smi_fed.inversion.adaptive import Adaptive
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.early_stop import Converged
from smi_fed.inversion.engine import InversionProgress, invert, trajectories
from smi_fed.inversion.leaving import Last
from smi_fed.inversion.loop import DivergedError
from smi_fed.inversion.losses import FeatureStatistics, feature_statistics
from smi_fed.inversion.parametrisation import PixelsConfig, PyramidConfig
from smi_fed.inversion.planning import Fixed
from smi_fed.inversion.rebirth import Rebirth
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.stopping import Keep
from smi_fed.sparse_images import SparseImages

__all__ = [
    "Adaptive",
    "Converged",
    "DivergedError",
    "FeatureStatistics",
    "Fixed",
    "InversionConfig",
    "InversionProgress",
    "Keep",
    "Last",
    "PixelsConfig",
    "PyramidConfig",
    "Rebirth",
    "SparseImages",
    "StopSchedule",
    "feature_statistics",
    "invert",
    "trajectories",
]
