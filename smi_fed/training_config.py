"""Settings of a training, and presets of them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from smi_fed.augmentation import Augmentation
from smi_fed.checks import (
    Allowed,
    Betas,
    Count,
    Flag,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Share,
    checked,
    require,
)
from smi_fed.tuning import Trainable

FINETUNE: dict[str, Any] = {
    "steps": 10_000, "epochs": 10.0, "batch_size": 32, "optimiser": "adamw", "learning_rate": 3e-4,
    "betas": (0.9, 0.999), "warmup": 0.1, "jitter": 0, "layer_decay": 0.75, "balanced": True,
    "augmentation": "standard", "validation": 0.1,
}  # fmt: skip
HEAD: dict[str, Any] = {"learning_rate": 3e-3, "trainable": "head", "layer_decay": 1.0}


@checked
class TrainingConfig:
    """Settings of `train`; the defaults are for small models from random weights.

    Args:
        steps: optimiser steps, at most.
        epochs: passes over the images, at most; None sets no such bound.
        batch_size: images per step, with replacement across epochs.
        optimiser: muon (hidden matrices by Muon, everything else by AdamW) | adamw.
        learning_rate: AdamW's peak, above 0.
        muon_learning_rate: Muon's peak, above 0.
        betas: AdamW's.
        weight_decay: of both, >= 0.
        warmup: share of the steps that the rates rise, inside (0, 1); then they fall by a cosine.
        clip: largest gradient norm, above 0.
        jitter: largest cyclic shift of training images in pixels.
        trainable: all | head | last:N, see `smi_fed.tuning.trained_weights`.
        layer_decay: each layer's rate over that of the one after it, in (0, 1]; below 1 it needs
            adamw, and vectors are not decayed.
        balanced: draw each class as often as any other.
        augmentation: none | standard | randaugment, see `smi_fed.augmentation`.
        precision: float32 | bfloat16 (autocast, in a distillation of the teachers too; the weights stay as they are).
        validation: share of the images that is not trained on but says when to stop, in [0, 1);
            the weights at its lowest loss are kept. 0 trains to the end.
        patience: so many looks, one after each epoch, without a lower loss end the training.

    Raises:
        SettingError: naming what cannot be.
    """

    steps: Count = 300
    batch_size: Count = 64
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 3e-3
    muon_learning_rate: Positive = 0.01
    betas: Betas = (0.9, 0.95)
    weight_decay: NonNegative = 0.05
    warmup: Share = 0.15
    clip: Positive = 1.0
    jitter: Natural = 1
    epochs: Annotated[Positive | None, Allowed("a number > 0 or null")] = None
    trainable: Trainable = "all"
    layer_decay: Annotated[float, Field(strict=True, gt=0, le=1), Allowed("a number in (0, 1]")] = 1.0
    balanced: Flag = False
    augmentation: Augmentation = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    validation: Fraction = 0.0
    patience: Count = 3

    def __post_init__(self) -> None:
        good = self.layer_decay == 1 or self.optimiser == "adamw"
        require(good, "layer_decay", self.layer_decay, "1, unless optimiser is adamw")

    @classmethod
    def scratch(cls, **changes: Any) -> Self:
        """For small models from random weights, with `changes`."""
        return cls(**changes)

    @classmethod
    def finetune(cls, **changes: Any) -> Self:
        """For pretrained models, with `changes`: small rates, smaller ones further from the head."""
        return cls(**{**FINETUNE, **changes})

    @classmethod
    def head(cls, **changes: Any) -> Self:
        """For a new head on a pretrained model that stays as it is, with `changes`."""
        return cls(**{**FINETUNE, **HEAD, **changes})

    def over(self, images: int) -> Self:
        """The same in steps alone, for so many images."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * images / self.batch_size))
        return replace(self, steps=min(self.steps, steps), epochs=None)

    @property
    def summary(self) -> str:
        """The nearest preset and what differs from it, in words."""
        ways = {name: getattr(type(self), name)() for name in ("scratch", "finetune", "head")}
        names = [each.name for each in fields(TrainingConfig)]
        other = {w: [n for n in names if getattr(self, n) != getattr(preset, n)] for w, preset in ways.items()}
        name = min(other, key=lambda way: len(other[way]))
        return ", ".join([name, *(f"{key} {getattr(self, key)}" for key in other[name])])
