"""Was an example among a model's training data? The likelihood-ratio attack (Carlini et al., S&P 2022, section 5).

A model is compared with others whose training data are known: how sure is it of the example's class,
against how sure those are that were trained with it, and those that were trained without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

FALSE_POSITIVES = (0.001, 0.01)
"""Rates at which an attack is judged: one that is right about few, but sure, is an attack; a mean hides it."""


@dataclass(frozen=True)
class Leak:
    """How well members were told from others.

    Attributes:
        auc: chance that a member's score is above another's; 0.5 is guessing.
        found: share of the members that are found where so many of the others are taken for members, by that rate.
        members, others: how many decisions there were.
    """

    auc: float
    found: dict[float, float]
    members: int
    others: int


def confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of each example's own class (n,) float64, from logits (n, classes); equation 3, stable."""
    wide, rows = logits.double(), torch.arange(len(labels))
    others = wide.clone()
    others[rows, labels] = -torch.inf
    return wide[rows, labels] - others.logsumexp(1)


def likelihood_ratios(seen: Tensor, shadows: Tensor, inside: Tensor) -> Tensor:
    """log of how much likelier each of a model's confidences is if the example was a member (n,).

    Online, with one variance for all examples, as the paper does where shadow models are few. Of each example as many
    models with it are looked at as without it: the mean of fewer is noisier, and would tell by itself.

    Args:
        seen: (n,) confidences of the model under attack.
        shadows: (models, n) confidences of models whose members are known.
        inside: (models, n) bool, whether the example was among their training data. Each
            example is inside of one at least, and outside of one.

    Raises:
        ValueError: shapes that do not fit, or an example that is inside of all or of none.
    """
    fits = shadows.shape == inside.shape and seen.shape == shadows.shape[1:]
    if not fits or not bool((inside.any(0) & ~inside.all(0)).all()):
        raise ValueError(
            f"shadows: got {tuple(shadows.shape)} with members {tuple(inside.shape)} for {tuple(seen.shape)} examples, "
            "allowed: (models, n) twice and (n,), each example inside of one model at least and outside of one"
        )
    logs, fewest = [], torch.minimum(inside.sum(0), (~inside).sum(0))
    for side in (inside, ~inside):
        chosen = side & (side.cumsum(0) <= fewest)
        mean = (shadows * chosen).sum(0) / chosen.sum(0)
        variance = (((shadows - mean) ** 2) * chosen).sum() / chosen.sum()
        logs.append(-((seen - mean) ** 2) / (2 * variance.clamp(min=1e-12)) - variance.clamp(min=1e-12).log() / 2)
    return logs[0] - logs[1]


def leak_of(scores: Tensor, member: Tensor, rates: Sequence[float] = FALSE_POSITIVES) -> Leak:
    """What scores (n,) tell of who was a member (n,) bool; there are some of both.

    Raises:
        ValueError: only members, or none.
    """
    truth = member.numpy()
    false, true, _ = roc_curve(truth, scores.double().numpy())
    found = {rate: float(true[false <= rate].max()) for rate in rates}
    return Leak(float(roc_auc_score(truth, scores.numpy())), found, int(member.sum()), int((~member).sum()))
