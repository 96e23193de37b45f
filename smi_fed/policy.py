"""What a client may claim; `smi_fed.strategies.admission` applies it."""

from __future__ import annotations

from typing import Annotated

import timm
from pydantic import AfterValidator, Field

from smi_fed.checks import Allowed, Count, SettingError, Text, checked
from smi_fed.registry import registered

PATTERNS = (
    # ViTs and DeiTs, trained with labels; by masking; on pairs of texts and images; without labels
    "vit_tiny_patch16_*", "vit_small_patch16_[23]*", "vit_base_patch16_[23]*", "vit_small_patch32_*",
    "vit_base_patch32_[23]*", "deit_*", "deit3_small_*", "deit3_medium_*", "deit3_base_*",
    "vit_base_patch16_clip_*", "vit_base_patch32_clip_*", "vit_base_patch16_siglip_*", "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_base_patch16_dinov3",
    "vit_base_patch16_dinov3_qkvb", "vit_small_patch8_224", "vit_base_patch8_224", "eva02_tiny_*", "eva02_small_*",
    "eva02_base_*", "beitv2_base_*", "vit_small_patch16_rope_*", "vit_base_patch16_rope_*",
    # windows and convolutions
    "swin_tiny_*", "swin_small_*", "swin_base_*", "swinv2_tiny_*", "swinv2_small_*", "resnet10t", "resnet18",
    "resnet26t", "resnet34", "resnet50", "convnext_atto", "convnext_femto", "convnext_nano", "convnext_tiny",
    "convnext_small", "convnext_base", "convnextv2_atto", "convnextv2_nano", "convnextv2_tiny", "efficientnet_b[0-4]",
    "tf_efficientnet_lite[0-4]", "tf_efficientnetv2_s", "mobilenetv3_large_100", "regnety_016", "regnety_032",
)  # fmt: skip

DEFAULT_ARCHITECTURES = tuple(sorted(timm.list_models(list(PATTERNS))))
"""What timm, as it is installed, has of `PATTERNS`."""


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
