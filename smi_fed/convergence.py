"""When has a curve converged? Defined once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def reaches(values: Sequence[float], costs: Sequence[float], target: float) -> float | None:
    """The cost at which a rising curve reaches `target` for good.

    Args:
        values: measured in order of cost, for example test accuracy.
        costs: what each measurement had cost so far (rounds, steps or seconds), rising.
        target: what to reach.

    Returns:
        The cost of the first value from which on no value falls below `target`; None when
        there is none. A curve that touches the target and relapses has not reached it.

    Raises:
        ValueError: lengths differ, or costs do not rise.
    """
    if len(values) != len(costs):
        raise ValueError(f"got {len(values)} values and {len(costs)} costs, need one cost per value")
    if any(later <= earlier for earlier, later in pairwise(costs)):
        raise ValueError(f"costs have to rise, got {list(costs)}")
    reached = None
    for value, cost in zip(values, costs, strict=True):
        if not value >= target:  # NaN is below every target
            reached = None
        elif reached is None:
            reached = cost
    return reached


def speedup(cost: float | None, reference: float | None) -> float | None:
    """How many times cheaper than `reference`; None where either was never reached."""
    return None if cost is None or reference is None or cost <= 0 else reference / cost
