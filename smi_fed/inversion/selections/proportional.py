"""Patches drawn in proportion to attention."""

import torch
from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates


def proportional(candidates: Candidates) -> Tensor:
    """Scores (b, k) whose highest are draws without replacement, each patch weighted by its importance.

    The exponential trick of Efraimidis and Spirakis (2006): the largest of u^(1/w). What is
    attended to by chance early on is not kept for certain, and no patch is lost for certain.
    """
    weights = candidates.teacher.importance(candidates.view, candidates.targets).double()
    weights = weights / weights.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return candidates.uniform().clamp(min=1e-300).log() / weights.clamp(min=1e-12)
