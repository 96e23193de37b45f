"""Model specifications, and the only call of `timm.create_model` in the project."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from timm.layers import PatchEmbed
from torch import Tensor, nn

from smi_fed.checks import Allowed, Count, Number, Positive, SettingError, checked, is_integer, read, require

SCHEMA_VERSION = 1


FEW = Field(min_length=1)
ClassName = Annotated[str, Field(coerce_numbers_to_str=True)]
CHANNELS = Allowed("finite numbers, above 0 for std, one per channel")


@checked
class ModelSpec:
    """What it takes to build a classifier again, without its weights.

    Args:
        name: a timm model name.
        num_classes: number of classes, at least 1.
        image_size: height and width of the images in pixels; None takes the model's own.
        kwargs: keyword arguments for `timm.create_model`.
        mean, std: per-channel normalisation of images in [0, 1]; None takes timm's.
        class_names: names of the classes in the order of the logits.

    Raises:
        SettingError: a field that cannot be right, naming it.
    """

    name: Annotated[str, Field(strict=True, min_length=1), Allowed("a timm model name")]
    num_classes: Count
    image_size: Annotated[Count | None, Allowed("an int >= 1 or null")] = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: Annotated[Annotated[tuple[Number, ...], FEW] | None, CHANNELS] = None
    std: Annotated[Annotated[tuple[Positive, ...], FEW] | None, CHANNELS] = None
    class_names: Annotated[tuple[ClassName, ...] | None, Allowed("a list of names")] = None

    def __post_init__(self) -> None:
        kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in self.kwargs.items()}
        object.__setattr__(self, "kwargs", kwargs)  # one form, whether it came from JSON, YAML or Python
        good = self.class_names is None or len(self.class_names) == self.num_classes
        require(good, "class_names", self.class_names, f"{self.num_classes} names")

    def to_json(self) -> str:
        """The spec as JSON with a schema version."""
        return json.dumps({"schema": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read `to_json`'s text.

        Raises:
            SettingError: not JSON, an unknown schema version (both are named) or a bad field.
        """
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError("spec", text, "JSON text of a model spec") from error
        require(isinstance(fields, dict), "spec", fields, "a JSON object")
        schema = fields.pop("schema", None)
        require(schema == SCHEMA_VERSION, "spec.schema", schema, f"version {SCHEMA_VERSION}")
        try:
            return read(cls, fields)
        except SettingError as error:
            raise error.under("spec") from error


class Classifier(nn.Module):
    """A timm model that takes images in [0, 1] and normalises them itself.

    Attributes:
        spec: what it was built from.
        backbone: the timm model, which takes normalised images.
        mean, std: (c, 1, 1) buffers; not part of the state dict.
        image_size: (height, width) that it takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, backbone: nn.Module) -> None:
        super().__init__()
        self.spec, self.backbone = spec, backbone
        channels = input_channels(backbone)
        mean, std = normalisation(backbone, channels)
        mean, std = spec.mean or mean, spec.std or std
        for key, value in (("mean", mean), ("std", std)):
            require(len(value) == channels, key, value, f"{channels} values, one per input channel")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.image_size = input_size(backbone, spec.image_size or spec.kwargs.get("img_size"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, c, h, w) in [0, 1]."""
        return self.backbone((images - self.mean) / self.std)


def build_model(spec: ModelSpec) -> Classifier:
    """Build `spec` with random weights (or with what its kwargs tell timm to load).

    This is open to its own user: a spec that came from a client has to pass
    `smi_fed.strategies.admission` first.

    Raises:
        SettingError: an unknown architecture, arguments that the architecture does not
            take, sizes that contradict each other, or a patch size that does not divide
            the image, or a checkpoint that is not there.
    """
    kwargs = dict(spec.kwargs)
    checkpoint = kwargs.get("checkpoint_path")
    require(
        not checkpoint or Path(str(checkpoint)).is_file(), "kwargs.checkpoint_path", checkpoint, "a file of weights"
    )
    image_size = kwargs.get("img_size", spec.image_size)
    if spec.image_size is not None:
        good = _pair(image_size) == _pair(spec.image_size)
        require(good, "kwargs.img_size", image_size, f"image_size, {spec.image_size}")
    _check_patches(image_size, kwargs.get("patch_size"))
    if image_size is not None and "img_size" not in kwargs and _takes_image_size(spec, kwargs):
        kwargs["img_size"] = image_size
    classifier = Classifier(spec, _create(spec, kwargs))
    embed = getattr(classifier.backbone, "patch_embed", None)
    if isinstance(embed, PatchEmbed):
        _check_patches(classifier.image_size, embed.patch_size)
    elif image_size is not None:
        _check_runs(spec, kwargs, classifier.image_size)
    return classifier


def build_seeded(spec: ModelSpec, seed: int) -> Classifier:
    """`build_model` with random weights that are a function of `seed`; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(spec)


def _takes_image_size(spec: ModelSpec, kwargs: Mapping[str, Any]) -> bool:
    """Whether this architecture is built for an image size, seen on a build without memory."""
    with torch.device("meta"):
        probe = _create(spec, without_weights(kwargs))
    return any("img_size" in signature(kind.__init__).parameters for kind in type(probe).__mro__)


def _check_runs(spec: ModelSpec, kwargs: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Refuse an image size that the architecture cannot compute with, seen on a run without memory."""
    with torch.device("meta"), torch.no_grad():
        probe = _create(spec, without_weights(kwargs)).eval()
        try:
            probe(torch.empty(1, input_channels(probe), *size))
        except (AssertionError, RuntimeError, ValueError) as error:
            if "meta" not in str(error):  # then it is an operation that needs real numbers
                raise SettingError("image_size", size, f"a size that {spec.name} runs on ({error})") from error


def without_weights(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` less those that tell timm to load weights."""
    return {key: value for key, value in kwargs.items() if key not in ("pretrained", "checkpoint_path")}


def _create(spec: ModelSpec, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(spec.name, num_classes=spec.num_classes, **kwargs)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        if "nknown model" in str(error):
            near = ", ".join(timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]) or "see timm.list_models()"
            raise SettingError("name", spec.name, f"a timm model name, such as {near}") from error
        raise SettingError("kwargs", dict(kwargs), f"what {spec.name} takes ({error})") from error


def _check_patches(image: Any, patch: Any) -> None:
    if image is None or patch is None:
        return
    sides = zip(_pair(image), _pair(patch), strict=True)
    good = all(is_integer(side) and is_integer(p) and p > 0 and side % p == 0 for side, p in sides)
    require(good, "patch_size", patch, f"an int that divides the image size {image}")


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


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
    return _pair(getattr(embed, "img_size", None) or asked or traits.get("img_size") or default)


def count_parameters(model: nn.Module) -> int:
    """Number of weights in the model."""
    return sum(p.numel() for p in model.parameters())
