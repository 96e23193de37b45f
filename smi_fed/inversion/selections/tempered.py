"""Our own: attention's order, tempered by chance."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates
from smi_fed.inversion.selections.stratified import share


def tempered(candidates: Candidates) -> Tensor:
    """Scores (b, k): a patch's place in the order of importance, in [0, 1), plus a uniform draw.

    A small model's attention is nearly flat, so draws in proportion to it are nearly uniform,
    while its order keeps the same patches whatever the noise. Here the most important patch
    goes on almost surely and the least important hardly ever, by its place and not by its
    weight, and what is in between differs from image to image.
    """
    return share(candidates.teacher.importance(candidates.view, candidates.targets)) + candidates.uniform()
