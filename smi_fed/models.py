"""Model specifications, and the only call of `timm.create_model` in the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from smi_fed.checks import SettingError, is_integer, require
from smi_fed.model_inputs import Inputs, has_config, input_channels, input_size, logits_of, normalisation, pair_of
from smi_fed.registry import Registration, Sizes, register_model, registered
from smi_fed.spec import SCHEMA_VERSION, ModelSpec
from smi_fed.weights import PRETRAINED, load_pretrained, load_weights, local_source
from smi_fed.wrappers import unwrapped

__all__ = [
    "SCHEMA_VERSION",
    "Classifier",
    "ModelSpec",
    "adapt",
    "architecture_of",
    "backbone_of",
    "build_model",
    "build_seeded",
    "count_parameters",
    "input_channels",
    "logits_of",
    "register_model",
    "unwrapped",
]


WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir")
CONFIGURATIONS = ("pretrained_cfg", "pretrained_cfg_overlay")


class Classifier(nn.Module):
    """A model that takes images in [0, 1] and normalises them itself.

    Attributes:
        spec: what it was built from.
        backbone: the timm model, or a module of one's own, which takes normalised images.
        mean, std: (c, 1, 1) buffers; not part of the state dict.
        image_size: (height, width) that it takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec, backbone: nn.Module, inputs: Inputs | None = None) -> None:
        """`inputs` is what a module takes that does not say so itself; None reads it off a timm model."""
        super().__init__()
        self.spec, self.backbone = spec, backbone
        inputs = inputs or _inputs_of(backbone, spec)
        mean, std = spec.mean or inputs.mean, spec.std or inputs.std
        for key, value in (("mean", mean), ("std", std)):
            good = len(value) == inputs.channels
            require(good, key, value, f"{inputs.channels} values, one per input channel")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.image_size = inputs.image_size

    def normalised(self, images: Tensor) -> Tensor:
        """What the backbone is shown of images (b, c, h, w) in [0, 1]."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes), in the backbone's dtype, of images (b, c, h, w) in [0, 1] of any."""
        normalised = self.normalised(images)
        dtype = next(self.backbone.parameters(), normalised).dtype
        return logits_of(self.backbone(normalised.to(dtype)))


def backbone_of(model: nn.Module) -> nn.Module:
    """The model that has the layers: a classifier's own, else the module itself; in wrappers too."""
    inner = unwrapped(model)
    return unwrapped(inner.backbone) if isinstance(inner, Classifier) else inner


def _inputs_of(backbone: nn.Module, spec: ModelSpec) -> Inputs:
    channels = input_channels(backbone)
    size = input_size(backbone, spec.image_size or spec.kwargs.get("img_size"))
    return Inputs(channels, size, *normalisation(backbone, channels))


def build_model(spec: ModelSpec) -> Classifier:
    """Build `spec` with the weights that it starts from: random ones, timm's, or those of a file.

    This is open to its own user: a spec that came from a client has to pass
    `smi_fed.strategies.admission` first.

    Raises:
        SettingError: an unknown architecture, arguments that the architecture does not
            take, sizes that contradict each other, a patch size that does not divide
            the image, or a file of weights that is not there, is none or does not fit.
    """
    kwargs, source = local_source(spec)
    own = registered(spec.name)
    from_hub, cache = (False, None) if own else (kwargs.pop("pretrained", False), kwargs.pop("cache_dir", None))
    hub = spec.start == PRETRAINED
    require(not (own and hub), "start", spec.start, f"null, or a file: {spec.name} is not one of timm's models")
    classifier = _build_timm(spec, kwargs) if own is None else _build_registered(spec, own, kwargs)
    try:
        if source is not None:
            load_weights(classifier.backbone, source)
        elif from_hub:
            load_pretrained(classifier.backbone, spec.num_classes, cache)
    except SettingError as error:
        raise error if spec.start is None else SettingError("start", error.got, error.allowed) from error
    return classifier


def _build_timm(spec: ModelSpec, kwargs: dict[str, Any]) -> Classifier:
    image_size = kwargs.get("img_size", spec.image_size)
    if spec.image_size is not None:
        good = pair_of(image_size) == pair_of(spec.image_size)
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


def _build_registered(spec: ModelSpec, own: Registration, kwargs: dict[str, Any]) -> Classifier:
    size: Any = spec.image_size or kwargs.get("img_size") or own.image_size
    require(size is not None, "image_size", size, f"pixels: {spec.name} is registered without an image_size")
    try:
        module = own.build(spec.num_classes, size, kwargs)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise SettingError("kwargs", kwargs, f"what the builder of {spec.name} takes ({error})") from error
    require(isinstance(module, nn.Module), "name", spec.name, f"a builder of a torch.nn.Module; got {type(module)}")
    classifier = _around(module, spec, size, own.channels, own.mean, own.std)
    _check_answers(classifier)
    return classifier


def adapt(
    module: nn.Module,
    *,
    image_size: Sizes,
    num_classes: int,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A `Classifier` over any module from images to logits, which shares its weights.

    It can be inverted and be a teacher or a student. Only a model that `build_model` builds
    can be saved or sent, since others have to build it again: see `register_model`.

    Args:
        module: takes normalised images (b, channels, h, w) and answers with logits
            (b, num_classes), or with an output that holds them as `logits`. Wrappers such as
            `torch.compile`'s are taken off. A timm ViT keeps its own patches.
        image_size: height and width in pixels, or both.
        num_classes, channels: of its logits and its images.
        mean, std: per-channel normalisation of images in [0, 1]; None is the module's
            `pretrained_cfg`, and without that images reach it as they are.

    Raises:
        SettingError: sizes that cannot be, or that contradict the module's own.
    """
    module = unwrapped(module)
    if isinstance(module, Classifier):
        mean = module.mean.flatten().tolist() if mean is None else mean
        std = module.std.flatten().tolist() if std is None else std
        module = unwrapped(module.backbone)
    pair = pair_of(image_size)
    good = len(pair) == 2 and all(is_integer(side) and side > 0 for side in pair)
    require(good, "image_size", image_size, "an int >= 1, or (height, width)")
    require(is_integer(channels) and channels > 0, "channels", channels, "an int >= 1")
    asked: dict[str, Any] = {"image_size": pair[0]} if pair[0] == pair[1] else {"kwargs": {"img_size": pair}}
    spec = ModelSpec(f"adapted:{type(module).__name__}", num_classes, mean=mean, std=std, **asked)  # type: ignore[arg-type]
    return _around(module, spec, pair, channels)


def _around(
    module: nn.Module, spec: ModelSpec, size: Sizes, channels: int, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Classifier:  # fmt: skip
    """A classifier of `spec` over `module`, on its device and in its mode; `mean` and `std` where the spec has none."""
    module = unwrapped(module)
    own = normalisation(module, channels) if has_config(module) else ((0.0,) * channels, (1.0,) * channels)
    inputs = Inputs(channels, input_size(module, size), mean or own[0], std or own[1])
    require(inputs.image_size == pair_of(size), "image_size", size, f"the module's own, {inputs.image_size}")
    classifier = Classifier(spec, module, inputs)
    reference = next((t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()), None)
    if reference is not None:
        classifier.mean, classifier.std = classifier.mean.to(reference), classifier.std.to(reference)
    return classifier.train(module.training)


@torch.no_grad()
def _check_answers(classifier: Classifier) -> None:
    """Refuse a registered model that does not take its images or does not answer with its logits."""
    spec, training = classifier.spec, classifier.training
    try:
        logits = classifier.eval()(classifier.mean.new_zeros(1, len(classifier.mean), *classifier.image_size))
    except Exception as error:  # whatever a module of somebody's own raises
        if "meta" in str(error):  # an operation that needs real numbers
            return
        raise SettingError("name", spec.name, f"a model that takes {classifier.image_size} px ({error})") from error
    finally:
        classifier.train(training)
    good = tuple(logits.shape) == (1, spec.num_classes)
    require(good, "name", spec.name, f"a builder of logits (b, {spec.num_classes}); got {tuple(logits.shape)}")


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


def without_weights(kwargs: Mapping[str, Any], names: Sequence[str] = WEIGHTS) -> dict[str, Any]:
    """`kwargs` less those that tell timm to load weights."""
    return {key: value for key, value in kwargs.items() if key not in names}


def architecture_of(spec: ModelSpec) -> ModelSpec:
    """What another process needs to build the same layers: `spec` without its start, its files and timm's tags.

    A tag, a directory and a configuration of timm's are replaced by what they say.

    Raises:
        SettingError: it cannot be built, or not without them.
    """
    own = registered(spec.name) is not None
    bare = replace(spec, start=None, kwargs=without_weights(spec.kwargs, ("checkpoint_path",) if own else WEIGHTS))
    kwargs = without_weights(bare.kwargs, CONFIGURATIONS)
    if own or (kwargs == bare.kwargs and not set(".:") & set(spec.name)):
        return bare
    with torch.device("meta"):
        backbone = build_model(bare).backbone
        inputs = _inputs_of(backbone, bare)
        sides = {} if "img_size" in kwargs else {"image_size": inputs.image_size[0]}
        name = str(vars(backbone)["pretrained_cfg"]["architecture"])
        mean, std = bare.mean or inputs.mean, bare.std or inputs.std
        plain = replace(bare, name=name, kwargs=kwargs, mean=mean, std=std, **sides)
        again = build_model(plain).backbone.state_dict()
    same = {key: each.shape for key, each in again.items()} == {k: v.shape for k, v in backbone.state_dict().items()}
    require(same, "name", spec.name, f"an architecture of timm's: it is not {name} with these arguments")
    return plain


def _create(spec: ModelSpec, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(spec.name, num_classes=spec.num_classes, **kwargs)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        if "nknown model" in str(error):
            near = ", ".join(timm.list_models(f"*{spec.name.split('_')[0]}*")[:5]) or "see timm.list_models()"
            allowed = f"a timm model name, such as {near}; or one that register_model was called with"
            raise SettingError("name", spec.name, allowed) from error
        raise SettingError("kwargs", dict(kwargs), f"what {spec.name} takes ({error})") from error


def _check_patches(image: Any, patch: Any) -> None:
    if image is None or patch is None:
        return
    sides = zip(pair_of(image), pair_of(patch), strict=True)
    good = all(is_integer(side) and is_integer(p) and p > 0 and side % p == 0 for side, p in sides)
    require(good, "patch_size", patch, f"an int that divides the image size {image}")


def count_parameters(model: nn.Module) -> int:
    """Number of weights in the model."""
    return sum(p.numel() for p in model.parameters())
