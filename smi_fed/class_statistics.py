"""A head out of sums: what a frozen start already knows of the classes, without a step of training.

Each client shows its images once to the same frozen model and sends, for each class, how many
there are and the sum of their features, and one matrix of second moments over all. The server
adds these up; the sums of all clients are exactly those of all images in one place, however the
classes are skewed. From them it solves for a linear head in closed form:

- `discriminant`, linear discriminant analysis with one covariance for all classes, after FedCGS
  (Guan et al., AAAI 2025, arXiv 2503.06962);
- `ridge`, regularised least squares on one-hot labels, after Fed3R (Fanì et al., ICML 2024,
  arXiv 2406.01116).

Deviations: FedCGS sends sums under secure aggregation, and here each client's own reach the
server; the covariance is shrunk towards its mean variance (Ledoit and Wolf, 2004, with a
constant share), since few images leave it singular. The sums of a class of one image are that
image's features: a client leaves classes of few images out, see `common_classes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi_fed.checks import require
from smi_fed.models import Classifier
from smi_fed.training import evaluating

SHRINKAGE, RIDGE = 0.1, 0.01


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Sums over images, in float64.

    Attributes:
        counts: (classes,) images of each class.
        sums: (classes, d) of their features.
        moments: (d, d) sum of the features' outer products, over all classes.
    """

    counts: Tensor
    sums: Tensor
    moments: Tensor

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Those of both sets of images."""
        return ClassStatistics(self.counts + other.counts, self.sums + other.sums, self.moments + other.moments)


@torch.no_grad()
def features(model: Classifier, images: Tensor) -> Tensor:
    """What enters the head (b, d), of images (b, c, h, w) in [0, 1].

    Raises:
        SettingError: the model's head is not one linear layer on pooled features.
    """
    backbone: Any = model.backbone
    linear_head(model)
    tokens = backbone.forward_features(model.normalised(images.to(model.mean)).to(next(backbone.parameters()).dtype))
    return backbone.forward_head(tokens, pre_logits=True)


def linear_head(model: Classifier) -> nn.Linear:
    """The last layer of `model`.

    Raises:
        SettingError: it is not one linear layer with a bias.
    """
    backbone: Any = model.backbone
    head = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    require(isinstance(head, nn.Linear), "model.student", model.spec.name, "a timm model with one linear head")
    assert isinstance(head, nn.Linear)
    require(head.bias is not None, "model.student", model.spec.name, "a head with a bias")
    return head


def class_statistics(model: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> ClassStatistics:
    """Statistics of a frozen model over batches of (images (b, c, h, w) in [0, 1], labels (b,)).

    Raises:
        SettingError: see `features`.
    """
    head = linear_head(model)
    classes, width = model.spec.num_classes, head.in_features
    found = [torch.zeros(*shape, dtype=torch.float64) for shape in ((classes,), (classes, width), (width, width))]
    counts, sums, moments = found
    with evaluating(model):
        for images, labels in batches:
            own = features(model, images).double().cpu()
            counts += labels.bincount(minlength=classes)
            sums.index_add_(0, labels, own)
            moments += own.T @ own
    return ClassStatistics(counts, sums, moments)


def common_classes(labels: Tensor, least: int) -> Tensor:
    """Places (k,) of the images whose class has at least `least` images among `labels` (n,)."""
    return (labels.bincount()[labels] >= least).nonzero()[:, 0]


def discriminant(known: ClassStatistics, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) of the linear discriminant; a class without images is never named.

    Args:
        shrinkage: share of the mean variance in the covariance, in (0, 1].
    """
    seen = known.counts > 0
    means = known.sums / known.counts.clamp(min=1)[:, None]
    within = known.moments - (known.counts[:, None] * means).T @ means
    covariance = within / known.counts.sum().clamp(min=1)
    mean_variance = covariance.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * mean_variance * eye, means.T).T
    prior = (known.counts / known.counts.sum().clamp(min=1)).clamp(min=1e-12).log()
    bias = prior - 0.5 * (weight * means).sum(1)
    # What all classes share changes no probability, but is so large that half precision would lose the rest.
    weight, bias = weight - _mean_of(weight, seen), bias - _mean_of(bias, seen)
    return weight.where(seen[:, None], 0.0), bias.where(seen, NEVER)


def _mean_of(rows: Tensor, seen: Tensor) -> Tensor:
    return rows[seen].sum(0) / seen.sum().clamp(min=1)


NEVER = -1e4
"""A logit that no softmax hears, finite so that weights may be averaged."""


def ridge(known: ClassStatistics, regularisation: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,), here 0, of least squares on one-hot labels.

    Args:
        regularisation: share of the mean second moment that is added to each, above 0.
    """
    eye = torch.eye(len(known.moments), dtype=known.moments.dtype)
    damping = regularisation * known.moments.diagonal().mean().clamp(min=1e-12)
    weight = torch.linalg.solve(known.moments + damping * eye, known.sums.T).T
    return weight, torch.zeros_like(known.counts)


@torch.no_grad()
def put_head(model: Classifier, head: tuple[Tensor, Tensor]) -> None:
    """Give `model`, in place, a head of (weight, bias)."""
    own = linear_head(model)
    weight, bias = head
    own.weight.copy_(weight)
    own.bias.copy_(bias)


def merged(parts: Sequence[ClassStatistics]) -> ClassStatistics:
    """Those of all clients' images together; at least one part."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def capped(known: ClassStatistics, images: float) -> ClassStatistics:
    """Statistics that weigh no more than so many images."""
    share = min(1.0, images / max(1.0, float(known.counts.sum())))
    return ClassStatistics(share * known.counts, share * known.sums, share * known.moments)
