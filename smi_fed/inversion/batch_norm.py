"""The BatchNorm-statistics prior of DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics, by name; timm's fused with activations too."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def nonnegative_keys(model: nn.Module) -> list[str]:
    """Of the state dict of `model`, what BatchNorm cannot have below 0: variances and counts of batches."""
    return [f"{name}.{kind}" for name in batch_norms(model) for kind in ("running_var", "num_batches_tracked")]


@dataclass(frozen=True)
class Seen:
    """What one BatchNorm layer was shown of a batch, and what it saw in training; tensors (channels,).

    Attributes:
        mean, variance: over images and positions of the batch, biased; with their graph.
        running_mean, running_variance: the layer's own.
    """

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


@contextmanager
def input_statistics(model: nn.Module) -> Iterator[list[Seen]]:
    """Collects, at every pass inside, the statistics of what each BatchNorm layer is shown.

    They are of float32 at least, whatever the model computes in.
    """
    seen: list[Seen] = []

    def collect(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        (shown,) = inputs
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        wide = shown.to(torch.promote_types(shown.dtype, torch.float32))
        others = [axis for axis in range(wide.ndim) if axis != 1]
        variance, mean = torch.var_mean(wide, others, correction=0)
        seen.append(Seen(mean, variance, norm.running_mean.to(mean), norm.running_var.to(variance)))

    with ExitStack() as after:
        for norm in batch_norms(model).values():
            after.callback(norm.register_forward_pre_hook(collect).remove)
        yield seen


def batch_norm_prior(seen: list[Seen]) -> Tensor:
    """Sum (scalar) over layers of the L2 distances of the batch's mean and of its variance to the running ones.

    The batch's composition is part of the result: an image inverted in another batch is
    another image.

    Args:
        seen: at least one layer.
    """
    distances = [torch.linalg.vector_norm(each.mean - each.running_mean) for each in seen]
    distances += [torch.linalg.vector_norm(each.variance - each.running_variance) for each in seen]
    return torch.stack(distances).sum()
