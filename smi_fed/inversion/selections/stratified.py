"""Attention, but from every region of the image."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates

SIDE = 2
"""Patches along the side of a region."""


def stratified(candidates: Candidates) -> Tensor:
    """Scores (b, k): first the most important patch of every region, then each one's second, and so on.

    Regions of 2 x 2 patches. Among patches of equal rank in their regions the more important
    goes on, so any number of patches is spread over the image as evenly as it can be.
    """
    importance = candidates.teacher.importance(candidates.view, candidates.targets)
    return -rank_in_region(importance, regions(candidates.view.positions, candidates.teacher.grid)) + share(importance)


def regions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The region (b, k) of each position on a grid of (rows, columns)."""
    columns = grid[1]
    return positions // columns // SIDE * columns + positions % columns // SIDE


def rank_in_region(scores: Tensor, region: Tensor) -> Tensor:
    """How many patches of the same region score higher (b, k); the earlier of two equal ones is higher."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    higher = place[:, None, :] < place[:, :, None]
    return (higher & (region[:, None, :] == region[:, :, None])).sum(2)


def share(scores: Tensor) -> Tensor:
    """Order of scores within an image (b, k), in [0, 1)."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1) / scores.shape[1]
