"""Adam over parameters whose images may be of different age."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.state import State

EPSILON = 1e-8


def learning_rate(config: InversionConfig, age: Tensor) -> Tensor:
    """Rate (b,) of images of `age` (b,) iterations."""
    rate = torch.full_like(age, config.learning_rate, dtype=torch.float64)
    if config.learning_rate_decay == "cosine":
        rate = rate * 0.5 * (1 + (math.pi * age / config.iterations).cos())
    return rate


@torch.no_grad()
def adam_step(state: State, config: InversionConfig, still: Tensor) -> None:
    """One step in place from the parameters' `.grad` (Kingma and Ba, 2015, algorithm 1).

    `torch.optim.Adam` counts steps per tensor; here each image counts its own, so that
    images of different age share a batch; those that are `still` (b,) do not move.
    """
    beta1, beta2 = config.betas
    steps = (state.age + 1).double()  # a float to the power of an int64 tensor would be float32
    scale = learning_rate(config, state.age) / (1 - beta1**steps) * ~still
    correction = (1 - beta2**steps).sqrt()
    for name, parameter in state.parameters.items():
        gradient, first, second = parameter.grad, state.first[name], state.second[name]
        assert gradient is not None
        per_image = (-1,) + (1,) * (parameter.ndim - 1)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second.sqrt() / correction.to(second).view(per_image)).add_(EPSILON)
        parameter.sub_(first / denominator * scale.to(first).view(per_image))
