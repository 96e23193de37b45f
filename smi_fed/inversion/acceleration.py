"""The same teacher, faster; every change to the model ends with its context."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from smi_fed.inversion.config import InversionConfig

log = logging.getLogger("smi_fed")

SHAPES = 64
"""Versions of one block's code that are compiled before the rest runs uncompiled."""


@contextmanager
def accelerated(model: nn.Module, config: InversionConfig) -> Iterator[None]:
    """What `config` asks for: weights ready for bfloat16, compiled blocks."""
    with ExitStack() as stack:
        if config.precision == "bfloat16":
            stack.enter_context(half_weights(model))
        if config.compile and compiler_works(next(model.parameters()).device.type):
            stack.enter_context(compiled_blocks(model))
        yield


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
