"""Settings of a distillation, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from smi_fed.checks import is_number, require, require_choice
from smi_fed.training import TrainingConfig

ENSEMBLES = ("uniform", "examples", "class")


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """Settings of `distill`; those of `TrainingConfig` are the student's optimiser.

    Args:
        temperature: of both softmaxes, above 0.
        mixup: Beta parameter of mixing pairs of synthetic images; 0 is off.
        tokens: which tokens the student is shown: all | kept | mixed (either, by batch).
        ensemble: how teachers are weighted: uniform | examples | class.
        relabel: weight of the patch tokens' own labels (`smi_fed.relabelling`), >= 0; 0 is off, else
            the student has to be shown all tokens.

    Raises:
        SettingError: naming what cannot be.
    """

    steps: int = 600
    temperature: float = 2.0
    mixup: float = 1.0
    tokens: str = "all"
    ensemble: str = "class"
    relabel: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "a number > 0")
        require(is_number(self.mixup) and self.mixup >= 0, "mixup", self.mixup, "a number >= 0")
        require_choice("tokens", self.tokens, ("all", "kept", "mixed"))
        require_choice("ensemble", self.ensemble, ENSEMBLES)
        require(is_number(self.relabel) and self.relabel >= 0, "relabel", self.relabel, "a number >= 0")
        require(not self.relabel or self.tokens == "all", "relabel", self.relabel, "0 unless tokens is all")


@dataclass
class DistillationRecord:
    """What a distillation did: steps, seconds, and the loss after each step."""

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
