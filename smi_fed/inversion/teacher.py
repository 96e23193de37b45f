"""The teacher as the inversion loop sees it: one protocol, one adapter per kind of model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smi_fed import tokens
from smi_fed.checks import require
from smi_fed.models import Classifier, input_channels, input_size, normalisation


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
        mean, std: (c, 1, 1) normalisation of pixels in [0, 1].
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
        backbone = model.backbone if isinstance(model, Classifier) else model
        self.backbone: Any = backbone
        self.channels = input_channels(backbone)
        height, width = model.image_size if isinstance(model, Classifier) else input_size(backbone)
        self.patch_size = patch_size
        self.grid = (height // patch_size[0], width // patch_size[1])
        self.classes: int = backbone.num_classes  # type: ignore[assignment]
        reference = next(backbone.parameters())
        if isinstance(model, Classifier):
            mean, std = model.mean, model.std
        else:
            pair = normalisation(backbone, self.channels)
            mean, std = (torch.tensor(value).view(-1, 1, 1) for value in pair)
        self.mean, self.std = mean.to(reference), std.to(reference)


class TokenTeacher(_Adapter):
    """A ViT whose stopped patches leave the computation: pixels are gathered before the embedding."""

    needs_canvas = False

    def __init__(self, model: nn.Module) -> None:
        backbone = model.backbone if isinstance(model, Classifier) else model
        super().__init__(model, backbone.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
        self.prefix_tokens = self.backbone.num_prefix_tokens

    def logits(self, view: View) -> Tensor:
        return tokens.forward_patches(self.backbone, view.patches, view.positions)

    def features(self, view: View) -> tuple[Tensor, list[Tensor]]:
        with tokens.token_features(self.backbone) as outputs:
            logits = self.logits(view)
        return logits, outputs

    def importance(self, view: View, targets: Tensor) -> Tensor:
        if tokens.reads_attention(self.backbone):
            return tokens.attention_to_patches(self.backbone, view.patches, view.positions)
        return saliency(self, view, targets)


class MaskedTeacher(_Adapter):
    """Any other model: it sees whole images, and only kept patches receive a gradient.

    Its FLOPs are those of dense inversion. The patch grid is one of pixels.
    """

    needs_canvas = True
    prefix_tokens = -1

    def logits(self, view: View) -> Tensor:
        canvas = view.patches.new_empty(view.patches.shape) if view.canvas is None else view.canvas
        return self.backbone(tokens.to_images(tokens.put(canvas, view.positions, view.patches), self.grid))

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
    """The adapter for `model`, a `Classifier` or a plain timm model.

    Args:
        patch_size: grid for models without patch tokens; None is about 8 x 8 patches.

    Raises:
        ValueError: a patch size that does not divide the image, or differs from a token model's own.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    if tokens.is_token_model(backbone):
        teacher = TokenTeacher(model)
        own = teacher.patch_size
        require(patch_size is None or own == (patch_size,) * 2, "patch_size", patch_size, f"the model's own, {own}")
        return teacher
    height, width = model.image_size if isinstance(model, Classifier) else input_size(backbone)
    size = (patch_size, patch_size) if patch_size else default_patch_size(height, width)
    fits = height % size[0] == 0 and width % size[1] == 0
    require(fits, "patch_size", patch_size, f"a divisor of the image size {(height, width)}")
    return MaskedTeacher(model, size)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients inside; mode and flags as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    with ExitStack() as after:
        for module, training in modes:
            after.callback(setattr, module, "training", training)
        for weight, flag in flags:
            after.callback(weight.requires_grad_, flag)
        model.eval()
        model.requires_grad_(False)
        yield
