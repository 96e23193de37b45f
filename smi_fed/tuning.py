"""Which weights of a model are trained, how fast, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from smi_fed.checks import Allowed, SettingError
from smi_fed.models import backbone_of
from smi_fed.weights import heads_of
from smi_fed.wrappers import plain

Trainable = Annotated[
    str, Field(strict=True, pattern="^(all|head|last:[1-9][0-9]*)$"), Allowed("all | head | last:N, N layers >= 1")
]


def trained_weights(model: nn.Module, trainable: str) -> list[nn.Parameter]:
    """The weights that `trainable` names: all, those of the head, or of the head and the last N layers before it.

    What is a layer timm says: a block of a ViT, with the last one the norm after it.

    Raises:
        SettingError: more layers than the model has, or a model that does not say its layers.
    """
    backbone = backbone_of(model)
    if trainable == "all":
        return list(backbone.parameters())
    heads = heads_of(backbone)
    with plain(backbone):
        named = dict(backbone.named_parameters())
        head = [name for name in named if name.startswith(tuple(f"{each}." for each in heads))]
        if trainable == "head":
            return [named[name] for name in head]
        matcher: Any = getattr(backbone, "group_matcher", None)
        if matcher is None:
            allowed = f"all | head, since {type(backbone).__name__} does not say which layers it has"
            raise SettingError("trainable", trainable, allowed)
        places: Any = group_parameters(backbone, matcher(coarse=False), reverse=True)
    before = sorted(set(places.values()) - {places[name] for name in head})
    count, layers = int(trainable.removeprefix("last:")), before[1:]  # the first is the embedding
    if count > len(layers):
        allowed = f"all | head | last:N with N from 1 to {len(layers)}, the layers of {type(backbone).__name__}"
        raise SettingError("trainable", trainable, allowed)
    return [weight for name, weight in named.items() if places[name] >= layers[-count]]


@contextmanager
def only_trained(model: nn.Module, trainable: str) -> Iterator[None]:
    """Inside, only what `trainable` names needs gradients; `requires_grad` is as before afterwards."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    chosen = None if trainable == "all" else {id(weight) for weight in trained_weights(model, trainable)}
    try:
        for weight, needed in before:
            weight.requires_grad_(needed and (chosen is None or id(weight) in chosen))
        yield
    finally:
        for weight, needed in before:
            weight.requires_grad_(needed)


def training_mode(model: nn.Module, trainable: str) -> None:
    """Training mode; but what `trainable` leaves out as a whole is in evaluation mode, its BatchNorms too."""
    model.train()
    for module in model.modules() if trainable != "all" else ():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def decayed_groups(model: nn.Module, rate: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose rates fall by `layer_decay` from each layer to the one before it.

    Vectors and what timm names are not decayed. Only weights that are trained are in a group.
    """
    backbone = backbone_of(model)
    spared = getattr(backbone, "no_weight_decay", set)()
    with plain(backbone):
        groups = param_groups_layer_decay(backbone, weight_decay, spared, layer_decay=layer_decay)
    return [{**group, "lr": rate * group["lr_scale"]} for group in groups]


class Best:
    """The weights at the lowest loss so far, and whether it still falls.

    Args:
        model: whose trained weights and buffers are kept.
        patience: so many looks without a lower loss end it, >= 1.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.tensors: list[Tensor] = [w for w in model.parameters() if w.requires_grad] + list(model.buffers())
        self.patience, self.loss, self.worse = patience, float("inf"), 0
        self.kept: list[Tensor] = []

    def done(self, loss: float) -> bool:
        """Look at a loss; True where it is time to stop."""
        if loss < self.loss:
            self.loss, self.worse = loss, 0
            self.kept = [tensor.detach().clone() for tensor in self.tensors]
        else:
            self.worse += 1
        return self.worse >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back; without a finite loss so far nothing happens."""
        for tensor, kept in zip(self.tensors, self.kept, strict=False):
            tensor.copy_(kept)
