"""What a model is shown, as it says itself: channels, image size and normalisation; and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smi_fed.checks import is_integer


@dataclass(frozen=True)
class Inputs:
    """Images that a model takes.

    Attributes:
        channels: of the images.
        image_size: (height, width) in pixels.
        mean, std: one number per channel; with them images in [0, 1] are normalised.
    """

    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def has_config(backbone: nn.Module) -> bool:
    """Whether timm built this model and noted what it takes; a wrapper that hands attributes on did not."""
    return bool(vars(backbone).get("pretrained_cfg"))


def input_channels(backbone: nn.Module) -> int:
    """Input channels of a timm model: what it says, else those of its first convolution."""
    own = getattr(backbone, "in_chans", None)
    if is_integer(own):
        return own  # type: ignore[return-value]
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        return first.in_channels
    return backbone.pretrained_cfg.get("input_size", (3, 224, 224))[0]  # type: ignore[union-attr]


def normalisation(backbone: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a timm model's `pretrained_cfg`, averaged where the channels are not its own."""
    cfg: Any = getattr(backbone, "pretrained_cfg", None) or {}
    mean, std = tuple(cfg.get("mean", (0.5,) * 3)), tuple(cfg.get("std", (0.5,) * 3))
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def input_size(backbone: nn.Module, asked: int | Sequence[int] | None = None) -> tuple[int, int]:
    """(height, width) that a timm model takes: its embedding's, else what was asked for, else its default."""
    embed = getattr(backbone, "patch_embed", None)
    traits = getattr(backbone, "_traits", {})  # where timm notes `img_size` for any model
    cfg: Any = getattr(backbone, "pretrained_cfg", None) or {}
    default = tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return pair_of(getattr(embed, "img_size", None) or asked or traits.get("img_size") or default)


def pair_of(value: Any) -> tuple[Any, Any]:
    """(height, width) of a size, which may be one number for both."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier answers.

    Args:
        output: a tensor, or an object or mapping that holds one as `logits`, as Hugging
            Face's models answer.

    Raises:
        ValueError: neither.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    kind = type(output).__name__
    raise ValueError(f"model: got an output of type {kind}; allowed: a tensor of logits, or an output with .logits")
