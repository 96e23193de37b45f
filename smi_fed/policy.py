"""What a client may claim; `smi_fed.strategies.admission` applies it."""

from __future__ import annotations

from typing import Annotated

import timm
from pydantic import AfterValidator, Field

from smi_fed.checks import Allowed, Count, SettingError, Text, checked
from smi_fed.registry import registered

DEFAULT_ARCHITECTURES = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224",
    "deit_small_patch16_224", "deit_base_patch16_224", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224",
    "resnet10t", "resnet18", "resnet26t", "resnet34", "resnet50", "convnext_atto", "convnext_tiny",
)  # fmt: skip


def _known(name: str) -> str:
    if not timm.is_model(name) and registered(name) is None:
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        some = ", ".join(near or DEFAULT_ARCHITECTURES[:3])
        raise SettingError("", name, f"a timm model name, such as {some}, or one of register_model")
    return name


@checked
class AdmissionPolicy:
    """What a client may claim.

    Args:
        architectures: names that are let in, exactly, timm's and those of `register_model`; none
            takes `DEFAULT_ARCHITECTURES`.
        max_parameters: largest model.
        max_examples: claimed examples are cut to this.
        max_claim_ratio: ... and to this many times the median claim of the round, at least 1, so
            that one client cannot outweigh all others by a number.

    Raises:
        SettingError: naming what cannot be.
    """

    architectures: tuple[Annotated[Text, AfterValidator(_known)], ...] = DEFAULT_ARCHITECTURES
    max_parameters: Count = 200_000_000
    max_examples: Count = 10_000_000
    max_claim_ratio: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False), Allowed("a number >= 1")] = 10.0

    def __post_init__(self) -> None:
        if not self.architectures:
            object.__setattr__(self, "architectures", DEFAULT_ARCHITECTURES)
