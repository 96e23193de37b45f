"""Class-gradient saliency."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates
from smi_fed.inversion.teacher import saliency


def gradient(candidates: Candidates) -> Tensor:
    """Size of the gradient of the target's logit in each patch (b, k), after Simonyan et al., 2014."""
    return saliency(candidates.teacher, candidates.view, candidates.targets)
