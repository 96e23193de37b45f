"""Class-gradient saliency."""

from torch import Tensor

from smi_fed.inversion.selections.look import Look
from smi_fed.inversion.teacher import saliency


def gradient(look: Look) -> Tensor:
    """Size of the gradient of the target's logit in each patch (b, k), after Simonyan et al., 2014."""
    return saliency(look.teacher, look.view, look.targets)
