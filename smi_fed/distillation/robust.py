"""How teachers' probabilities become one answer where some teachers may mean harm."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from smi_fed.checks import Allowed, Count, Share, checked

Part = Annotated[float, Field(strict=True, gt=0, le=1), Allowed("a number in (0, 1]")]
Cut = Annotated[float, Field(strict=True, ge=0, lt=0.5), Allowed("a number in [0, 0.5)")]


class Joining(Protocol):
    """How the probabilities of all teachers are joined; a settings class of its own, with a `kind`."""

    in_turn: ClassVar[bool]
    """Whether a weighted mean is all there is to it, so that one teacher's answers are in memory at a time."""

    def join(self, probabilities: Tensor, weights: Tensor) -> Tensor:
        """One share (b, classes) of each class, not normalised.

        Args:
            probabilities: (teachers, b, classes), each of which sums to 1 over the classes.
            weights: (teachers, 1 or b, 1 or classes) >= 0, some of each column above 0.
        """
        ...


class _Mean:
    """The weighted mean."""

    in_turn: ClassVar[bool] = True

    def join(self, probabilities: Tensor, weights: Tensor) -> Tensor:
        """See `Joining`."""
        return (probabilities * weights).sum(0)


@checked
class Mean(_Mean):
    """The weighted mean: a teacher is heard in proportion to its weight, whatever it says."""

    kind: Literal["mean"] = field(default="mean", kw_only=True)


@checked
class Median:
    """The weighted median of each class.

    Args:
        most: largest share of a class's votes that one teacher has, as long as others have seen the class; hostile
            teachers are borne as long as they have less than half of the votes together.
    """

    kind: Literal["median"] = field(default="median", kw_only=True)
    most: Part = 0.2
    in_turn: ClassVar[bool] = False

    def join(self, probabilities: Tensor, weights: Tensor) -> Tensor:
        """See `Joining`."""
        return weighted_median(probabilities, bounded(weights, self.most))


@checked
class Trimmed:
    """The weighted mean of each class, without the highest and the lowest votes.

    Args:
        cut: share of the votes that is left out at each end.
        most: as in `Median`.
    """

    kind: Literal["trimmed"] = field(default="trimmed", kw_only=True)
    cut: Cut = 0.25
    most: Part = 0.2
    in_turn: ClassVar[bool] = False

    def join(self, probabilities: Tensor, weights: Tensor) -> Tensor:
        """See `Joining`."""
        return trimmed_mean(probabilities, bounded(weights, self.most), self.cut)


@checked
class Agreement(_Mean):
    """The weighted mean of those that agree with the others; who does not is weighted down or out before.

    What is judged, and how, is in `smi_fed.distillation.agreement` and `smi_fed.distillation.triggers`.

    Args:
        images: most synthetic images of each teacher that the others judge.
        least: share of the teachers' median agreement below which a teacher is weighted down, and out at half of it.
        trigger: share of the others' images that a teacher knows from which a piece of a synthetic image has to drive
            it to one class, and few other teachers, to count as a backdoor's trigger; null does not look for triggers.
    """

    kind: Literal["agreement"] = field(default="agreement", kw_only=True)
    images: Count = 100
    least: Share = 0.5
    trigger: Annotated[Share | None, Allowed("a number inside (0, 1) or null")] = 0.95


def bounded(weights: Tensor, most: float) -> Tensor:
    """Weights of which none has more than `most` of all (dimension 0), or than an even share where few are above 0.

    What is cut is given to the others in proportion to their weights; a weight of 0 stays 0. Sums are 1.
    """
    weights = weights / weights.sum(0).clamp(min=1e-12)
    cap = (1 / (weights > 0).sum(0).clamp(min=1)).clamp(min=most)
    falling = weights.sort(dim=0, descending=True).values
    rest = falling.flip(0).cumsum(0).flip(0)  # of this and all smaller ones
    above = torch.arange(len(weights), dtype=weights.dtype, device=weights.device).view(-1, *[1] * (weights.ndim - 1))
    factor = (1 - above * cap).clamp(min=0) / rest.clamp(min=1e-12)
    # The first place where the largest of the rest fits: those before it have the cap.
    first = (factor * falling <= cap + 1e-6).to(torch.uint8).argmax(0, keepdim=True)
    found = torch.minimum(weights * factor.gather(0, first), cap)
    return found / found.sum(0).clamp(min=1e-12)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Where half of the weights lie on each side (dimension 0); the mean of both ends where there is a gap."""
    rising, order = values.sort(dim=0)
    total = weights.expand_as(values).gather(0, order).cumsum(0)
    half = total[-1:] / 2
    low, high = (total >= half - 1e-6), (total > half + 1e-6)
    ends = [rising.gather(0, each.to(torch.uint8).argmax(0, keepdim=True))[0] for each in (low, high)]
    return (ends[0] + ends[1]) / 2


def trimmed_mean(values: Tensor, weights: Tensor, cut: float) -> Tensor:
    """The weighted mean over dimension 0 without `cut` of the weights at each end, parts of weights included.

    Args:
        weights: sum to 1.
    """
    rising, order = values.sort(dim=0)
    own = weights.expand_as(values).gather(0, order)
    total = own.cumsum(0)
    kept = (total.clamp(max=1 - cut) - (total - own).clamp(min=cut)).clamp(min=0)
    return (kept * rising).sum(0) / kept.sum(0).clamp(min=1e-12)
