"""The same teacher, faster; every change to the model ends with its context."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.inversion.config import InversionConfig

log = logging.getLogger("smi_fed")

SHAPES = 64
"""Versions of one block's code that are compiled before the rest runs uncompiled."""


@contextmanager
def accelerated(model: nn.Module, config: InversionConfig) -> Iterator[None]:
    """A cheap gradient of the patch embedding, and what `config` asks for: weights in bfloat16, compiled blocks."""
    with ExitStack() as stack:
        stack.enter_context(embedding_gradient(model))
        if config.precision == "bfloat16":
            stack.enter_context(half_weights(model))
        tensors = chain(model.parameters(), model.buffers())
        if config.compile and compiler_works(next(tensors).device.type):
            stack.enter_context(compiled_blocks(model))
        yield


class _Embed(torch.autograd.Function):
    """A convolution of patches that do not overlap; its gradient to the pixels is one matrix product.

    The forward is torch's own, bit for bit. For the backward torch's general algorithm takes
    four times as long as the product (measured on two CPU cores, DeiT-Tiny, 16 images).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype = images.shape, images.dtype
        return F.conv2d(images, weight, bias, stride=weight.shape[2:])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        b, c, height, width = ctx.shape
        d, _, ph, pw = weight.shape
        rows = gradients[0].permute(0, 2, 3, 1).reshape(-1, d)
        tiles = (rows.to(weight.dtype) @ weight.flatten(1)).view(b, height // ph, width // pw, c, ph, pw)
        pixels = tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height // ph * ph, width // pw * pw)
        if pixels.shape != ctx.shape:  # what is left over of an image that patches do not divide is not seen
            pixels = F.pad(pixels, (0, width % pw, 0, height % ph))
        return pixels.to(ctx.dtype), None, None


@contextmanager
def embedding_gradient(model: nn.Module) -> Iterator[None]:
    """Patch embeddings without overlap take their gradient by `_Embed` inside."""
    with ExitStack() as after:
        for module in model.modules():
            conv = getattr(module, "proj", None) if isinstance(module, PatchEmbed) else None
            if type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and _is_plain(conv):
                after.callback(delattr, conv, "forward")
                conv.forward = functools.partial(_embed, conv)  # type: ignore[method-assign, reportAttributeAccessIssue]
        yield


def _embed(conv: nn.Conv2d, images: Tensor) -> Any:
    return _Embed.apply(images, conv.weight, conv.bias)


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1


@contextmanager
def half_weights(model: nn.Module) -> Iterator[None]:
    """Weights of linear and convolution layers in bfloat16 inside; the very same tensors afterwards.

    Autocast would cast them to the same values again in every forward, since it keeps casts
    only of weights that need a gradient.
    """
    with ExitStack() as after:
        for module in model.modules():
            if type(module) in (nn.Linear, nn.Conv2d):  # subclasses may use their weight in other precisions
                for weight in module.parameters(recurse=False):
                    if weight.dtype != torch.float32:  # autocast leaves doubles alone
                        continue
                    after.callback(setattr, weight, "data", weight.data)
                    weight.data = weight.data.bfloat16()
        yield


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Transformer blocks compiled one by one inside, so that equal ones share their code.

    Each number of patches is a shape of its own and is compiled when it first comes.
    Models without `blocks` are compiled whole.
    """
    backbone = getattr(model, "backbone", model)
    blocks = getattr(backbone, "blocks", None)
    modules = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else [backbone]
    with ExitStack() as after:
        # Every number of patches and every width is one shape more of the same code; the default, 8, is two teachers.
        after.enter_context(torch._dynamo.config.patch(recompile_limit=SHAPES))
        for module in modules:
            after.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module.compile(dynamic=False)
        yield


def uncompiled(config: InversionConfig) -> AbstractContextManager[object]:
    """For passes that listen inside a block, where compiled code would not call a hook."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


@functools.cache
def compiler_works(device: str) -> bool:
    """Whether `torch.compile` can build code for `device` here; a line of log says why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("compile: true, but no compiler works here, so the teacher runs uncompiled (%s)", reason[0])
        return False
    return True
