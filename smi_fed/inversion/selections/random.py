"""The control for every other selection."""

from torch import Tensor

from smi_fed.inversion.selections.look import Look


def random(look: Look) -> Tensor:
    """Uniformly at random (b, k). Costs no teacher pass."""
    return look.uniform()
