"""The teacher as the inversion loop sees it: one protocol, one adapter per kind of model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smi_fed import tokens
from smi_fed.checks import is_integer, require
from smi_fed.model_inputs import has_config, input_channels, input_size, normalisation
from smi_fed.models import Classifier, backbone_of, logits_of
from smi_fed.wrappers import REMEDY, plain, unwrapped


@dataclass(frozen=True)
class View:
    """What a teacher is shown of a batch.

    Attributes:
        patches: (b, k, c, ph, pw) normalised pixels of the kept patches.
        positions: (b, k) int64, where on the grid each stands in this view.
        canvas: (b, n, c, ph, pw) pixels of all patches, the stopped ones included, for
            teachers that cannot leave patches out; None for the others.
    """

    patches: Tensor
    positions: Tensor
    canvas: Tensor | None = None


class Teacher(Protocol):
    """What inversion needs to know of a model.

    Attributes:
        grid: (rows, columns) of patches; patch_size: (ph, pw) pixels.
        channels, classes: sizes of input and logits.
        mean, std: (c, 1, 1) normalisation of pixels in [0, 1]; on the device and in the dtype of pixels.
        dtype: of the model's weights. Pixels and logits are float32 where it is less.
        needs_canvas: whether views have to carry stopped patches too.
        backbone: the model itself, for who listens to its layers.
        prefix_tokens: tokens before the patches in `features`; -1 where there are no features.
    """

    grid: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    classes: int
    mean: Tensor
    std: Tensor
    dtype: torch.dtype
    needs_canvas: bool
    backbone: Any
    prefix_tokens: int

    def logits(self, view: View) -> Tensor:
        """(b, classes)."""
        ...

    def features(self, view: View) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the tokens (b, prefix + k, d) entering the first block and leaving each."""
        ...

    def importance(self, view: View, targets: Tensor) -> Tensor:
        """(b, k), larger for patches that matter more to the teacher's output."""
        ...


class _Adapter:
    """What both adapters read off the model."""

    def __init__(self, model: nn.Module, patch_size: tuple[int, int]) -> None:
        """Raises ValueError for a model without classes or a patch size that does not divide the image."""
        backbone = backbone_of(model)
        self.backbone: Any = backbone
        self.patch_size = patch_size
        height, width = _image_size(model)
        self.grid = (height // patch_size[0], width // patch_size[1])
        fits = height % patch_size[0] == 0 and width % patch_size[1] == 0
        require(fits, "patch_size", patch_size, f"a divisor of the image size {(height, width)}")
        if isinstance(model, Classifier):
            self.classes, self.channels = model.spec.num_classes, len(model.mean)
            mean, std = model.mean, model.std
        else:
            self.classes, self.channels = getattr(backbone, "num_classes", 0), input_channels(backbone)  # type: ignore[assignment]
            pair = normalisation(backbone, self.channels)
            mean, std = (torch.tensor(value).view(-1, 1, 1) for value in pair)
        require(is_integer(self.classes) and self.classes > 0, "model.num_classes", self.classes, "an int >= 1")
        reference = next(backbone.parameters(), mean)
        self.dtype = reference.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.mean, self.std = (each.to(reference.device, wide) for each in (mean, std))

    def _whole(self, logits: Any) -> Tensor:
        """The same logits in the pixels' dtype, where they are ones of whole images: not maps, tuples or tokens."""
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        good = isinstance(logits, Tensor) and logits.shape[1:] == (self.classes,)
        require(good, "model", shape, f"one that answers with logits (b, {self.classes})")
        return logits.to(self.mean.dtype)


class TokenTeacher(_Adapter):
    """A ViT whose stopped patches leave the computation: pixels are gathered before the embedding."""

    needs_canvas = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, backbone_of(model).patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
        self.prefix_tokens = self.backbone.num_prefix_tokens

    def logits(self, view: View) -> Tensor:
        return self._whole(tokens.forward_patches(self.backbone, view.patches.to(self.dtype), view.positions))

    def features(self, view: View) -> tuple[Tensor, list[Tensor]]:
        with tokens.token_features(self.backbone) as outputs:
            logits = self.logits(view)
        return logits, outputs

    def importance(self, view: View, targets: Tensor) -> Tensor:
        if tokens.reads_attention(self.backbone):
            return tokens.attention_to_patches(self.backbone, view.patches.to(self.dtype), view.positions)
        return saliency(self, view, targets)


class MaskedTeacher(_Adapter):
    """Any other model: it sees whole images, and only kept patches receive a gradient.

    Its FLOPs are those of dense inversion. The patch grid is one of pixels.
    """

    needs_canvas = True
    prefix_tokens = -1

    def logits(self, view: View) -> Tensor:
        canvas = view.patches.new_empty(view.patches.shape) if view.canvas is None else view.canvas
        pixels = tokens.to_images(tokens.put(canvas, view.positions, view.patches), self.grid)
        return self._whole(logits_of(self.backbone(pixels.to(self.dtype))))

    def features(self, view: View) -> tuple[Tensor, list[Tensor]]:
        raise ValueError("statistics: this model has no patch tokens to compare with; got a masked teacher")

    def importance(self, view: View, targets: Tensor) -> Tensor:
        return saliency(self, view, targets)


def saliency(teacher: Teacher, view: View, targets: Tensor) -> Tensor:
    """Size of the gradient of the target's logit in each patch (b, k), after Simonyan et al., 2014."""
    with torch.enable_grad():
        patches = view.patches.detach().requires_grad_()
        logits = teacher.logits(View(patches, view.positions, view.canvas))
        weights = targets if targets.ndim == 2 else nn.functional.one_hot(targets, logits.shape[1])
        (gradient,) = torch.autograd.grad((logits * weights).sum(), patches)
    return gradient.abs().sum((2, 3, 4))


def default_patch_size(height: int, width: int) -> tuple[int, int]:
    """Patch grid of about 8 x 8 for models that have none of their own: the largest divisors."""
    first, second = (next(p for p in range(max(1, side // 8), 0, -1) if side % p == 0) for side in (height, width))
    return first, second


def adapt(model: nn.Module, patch_size: int | None = None) -> Teacher:
    """The adapter for `model`, a `Classifier` or a plain timm model; in wrappers too.

    Args:
        patch_size: grid for models without patch tokens; None is about 8 x 8 patches.

    Raises:
        ValueError: a patch size that does not divide the image, or differs from a token
            model's own; a module that does not say what it takes.
    """
    model = unwrapped(model)
    backbone = backbone_of(model)
    known = isinstance(model, Classifier) or has_config(model) or tokens.is_token_model(model)
    require(known, "model", type(model).__name__, "a Classifier or a timm model; any other from images to logits by "
            f"smi_fed.models.adapt(module, image_size=..., num_classes=...); of a wrapper {REMEDY}")  # fmt: skip
    if tokens.is_token_model(backbone):
        teacher = TokenTeacher(model)
        own = teacher.patch_size
        require(patch_size is None or own == (patch_size,) * 2, "patch_size", patch_size, f"the model's own, {own}")
        return teacher
    return MaskedTeacher(model, (patch_size, patch_size) if patch_size else default_patch_size(*_image_size(model)))


def _image_size(model: nn.Module) -> tuple[int, int]:
    return model.image_size if isinstance(model, Classifier) else input_size(model)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no weight gradients, no wrappers and no compiled code inside; all as before afterwards."""
    with ExitStack() as after:
        for module in model.modules():
            after.enter_context(_same_attributes(module))
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                after.callback(module.register_forward_hook(_straight_gradient).remove)
        for weight in model.parameters():
            after.callback(weight.requires_grad_, weight.requires_grad)
        after.enter_context(plain(model))
        model.eval()
        model.requires_grad_(False)
        yield


@contextmanager
def _same_attributes(module: nn.Module) -> Iterator[None]:
    """Undoes what forwards in evaluation mode leave on a module, such as biases that LeViT computes from its weights.

    LeViT empties that dictionary in `train()` alone, which nobody calls when the mode is set back.
    """
    own = vars(module)
    before = {name: value for name, value in own.items() if not name.startswith("_")}
    caches = [(value, dict(value)) for value in (*before.values(), own.get("_buffers")) if type(value) is dict]
    for cache, content in caches:
        for key in [key for key, value in content.items() if getattr(value, "grad_fn", None) is not None]:
            del cache[key]  # it belongs to a graph of someone else, which may be freed
    try:
        yield
    finally:
        for cache, content in caches:
            cache.clear()
            cache.update(content)
        for name in [name for name in own if not name.startswith("_") and name not in before]:
            del own[name]
        own.update(before)


def _straight_gradient(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """torch 2.15 on a CPU gets BatchNorm's gradient wrong where that of one image comes transposed (XCiT, LeViT)."""
    alone = len(output) == 1 and output.device.type == "cpu"
    if alone and output.requires_grad and not torch.compiler.is_compiling():
        output.register_hook(torch.Tensor.contiguous)
