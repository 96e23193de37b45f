"""Settings of a distillation, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from smi_fed.checks import Choice, Count, Natural, NonNegative, Positive, Text, checked, one_of, require
from smi_fed.distillation.robust import Agreement, Mean, Median, Trimmed
from smi_fed.training import TrainingConfig

ENSEMBLES = ("uniform", "examples", "class", "certainty", "class_certainty")

BY_CLASS, BY_CERTAINTY = ("class", "class_certainty"), ("certainty", "class_certainty")
"""Those that need every client's label counts, and those that ask how sure a teacher is of each image."""

Robust = Annotated[Mean | Median | Trimmed | Agreement, Choice()]

START = "start"
"""What `DistillationRecord.kept` calls the weights before the first step."""


@checked
class DistillationConfig(TrainingConfig):
    """Settings of `distill`; those of `TrainingConfig` are the student's, over synthetic images.

    Its `balanced` goes by what the images were made for, its `validation` is a share of the
    synthetic images, on which the student is compared with the ensemble.

    Args:
        steps: optimiser steps, at most; 0 leaves the student as it is.
        temperature: of both softmaxes, above 0.
        mixup: Beta parameter of mixing pairs of synthetic images; 0 is off.
        tokens: which tokens the student is shown: all | kept | mixed (either, by batch).
        ensemble: how teachers are weighted: uniform | examples | class | certainty |
            class_certainty, see `ensemble_weights`.
        robust: how their probabilities are joined, mean | median | trimmed | agreement: a `Mean`, a `Median`, a
            `Trimmed` or an `Agreement`; the kind alone, as a text, stands for its defaults.
        others: teachers that are asked of an image beside those that it was made from, drawn by how much they are
            heard on its classes (`smi_fed.distillation.asking`); of few teachers, and where `robust` is no mean, all
            are asked; None asks all.
        relabel: weight of the patch tokens' own labels (`smi_fed.relabelling`), >= 0; 0 is off, else
            the student has to be shown all tokens.
        anchor: pull towards the weights that the student starts from, >= 0: half of it times their squared
            distance is added to the loss; 0 is off.

    Raises:
        SettingError: naming what cannot be.
    """

    steps: Natural = 500
    temperature: Positive = 2.0
    mixup: NonNegative = 1.0
    tokens: Literal["all", "kept", "mixed"] = "all"
    ensemble: Annotated[Text, one_of(ENSEMBLES)] = "class"
    robust: Robust = Mean()
    others: Count | None = 7
    relabel: NonNegative = 0.0
    anchor: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.relabel or self.tokens == "all", "relabel", self.relabel, "0 unless tokens is all")
        whole = self.tokens == "all" and not self.relabel
        allowed = "none, where tokens is not all or relabel > 0: a crop moves patches"
        require(whole or self.augmentation == "none", "augmentation", self.augmentation, allowed)

    @property
    def same_views(self) -> bool:
        """Whether an image looks the same each time that it is shown, so that teachers need to be asked once."""
        return not self.mixup and not self.jitter and self.augmentation == "none"


@dataclass
class DistillationRecord:
    """What a distillation did.

    Attributes:
        steps, seconds: that it took.
        losses: the loss after each step.
        kept: which weights the student has: those of the `start` or of `step N`. With images held out those that agree
            best with the ensemble on them, else those of the last step; of several students in their order.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    kept: str = START
