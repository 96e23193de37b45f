"""Models of one's own under a name, so that a spec can tell another process to build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import timm
from torch import nn

from smi_fed.checks import is_integer, is_number, require

Sizes = int | tuple[int, int]


@dataclass(frozen=True)
class Registration:
    """What is known of a registered model; see `register_model`."""

    name: str
    builder: Callable[..., nn.Module]
    image_size: Sizes | None = None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = isinstance(self.name, str) and bool(self.name) and not timm.is_model(self.name)
        require(good and ":" not in self.name, "name", self.name, "a name without ':' that is not one of timm's models")
        require(callable(self.builder), "builder", self.builder, "a function that returns a torch.nn.Module")
        require(is_integer(self.channels) and self.channels > 0, "channels", self.channels, "an int >= 1")
        for key, pair in self.bounds.items():
            good = len(pair) == 2 and all(map(is_number, pair)) and pair[0] <= pair[1]
            require(good, f"bounds.{key}", pair, "(least, most)")

    def build(self, num_classes: int, image_size: Sizes | None, kwargs: Mapping[str, Any]) -> nn.Module:
        """What the builder returns; `image_size` is passed to one that has an argument of that name."""
        asks = "image_size" in signature(self.builder).parameters and "image_size" not in kwargs
        return self.builder(num_classes=num_classes, **kwargs, **({"image_size": image_size} if asks else {}))


_REGISTERED: dict[str, Registration] = {}


def register_model(
    name: str,
    builder: Callable[..., nn.Module],
    *,
    image_size: Sizes | None = None,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Let `ModelSpec(name, ...)` build a model of one's own.

    A module that both the ClientApp and the ServerApp import is the place to call it in. The
    server lets such a reply in only where `name` is on its allow-list of architectures. It
    builds the model on torch's meta device first, so that the builder must not read weights.

    Args:
        name: what specs call it; none of timm's names. A second call replaces the first.
        builder: called as builder(num_classes=..., **spec.kwargs), and with the image size if
            it has an argument `image_size`. What it returns takes normalised images
            (b, channels, h, w) and answers with logits (b, num_classes), or with an output
            that holds them as `logits`.
        image_size: height and width in pixels where a spec has none.
        channels: of the images.
        mean, std: normalisation where a spec has none; None is the module's `pretrained_cfg`,
            and without that images in [0, 1] reach the module as they are.
        bounds: arguments that a client may set, each with the least and the most. Where both
            are ints, it takes ints alone.
        choices: arguments that a client may set, each with the values that it may have.

    Raises:
        SettingError: a name of timm's, or an argument that cannot be.
    """
    _REGISTERED[name] = Registration(
        name, builder, image_size, channels, mean, std, dict(bounds or {}), dict(choices or {})
    )


def registered(name: str) -> Registration | None:
    """What is registered under `name`; None where nothing is."""
    return _REGISTERED.get(name)
