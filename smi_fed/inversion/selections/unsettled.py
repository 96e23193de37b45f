"""Our own: the patches that are not settled yet, from every region of the image."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates
from smi_fed.inversion.selections.stratified import rank_in_region, regions, share


def unsettled(candidates: Candidates) -> Tensor:
    """Scores (b, k): from every region first the patch that the objective still pulls at most, and so on.

    Attention says where the teacher looks; what a stop costs is something else: how much the
    patch would still have changed. That is the size of the gradient of the whole objective,
    priors included, in its pixels. Regions (2 x 2 patches, as in `stratified`) keep what goes
    on spread over the image, as random does. Costs one forward and backward pass at a stop.
    """
    pull = candidates.pull()
    return share(pull) - rank_in_region(pull, regions(candidates.view.positions, candidates.teacher.grid))
