"""The control for every other selection."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates


def random(candidates: Candidates) -> Tensor:
    """Uniformly at random (b, k). Costs no teacher pass."""
    return candidates.uniform()
