"""Differential privacy at the client, as Flower's `LocalDpMod` has it: a clipped update, and noise on each weight.

Flower's own takes messages and draws from NumPy's global state; this takes a model and a generator, so that
an audit can be repeated. A test holds it against Flower's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smi_fed.checks import NonNegative, Positive, Share, checked


@checked
class LocalPrivacy:
    """What a client does to its update before it sends it; the arguments are those of Flower's `LocalDpMod`.

    Args:
        clipping_norm: largest norm of the update, over all weights.
        sensitivity: how far the updates of any two data sets lie apart, at most; that is twice the clipping norm.
            0 clips alone.
        epsilon, delta: the promise. The formula for the noise is proved for an epsilon below 1; above it is a name
            for less noise.
    """

    clipping_norm: Positive
    sensitivity: NonNegative
    epsilon: Positive
    delta: Share = 1e-5

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each weight (Dwork and Roth, 2014, theorem A.1)."""
        return self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon


@torch.no_grad()
def release(model: nn.Module, start: Mapping[str, Tensor], privacy: LocalPrivacy, generator: torch.Generator) -> None:
    """Change `model` in place into what its client sends.

    Args:
        start: the state dict that the server sent.
        generator: of the CPU.
    """
    found = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    updates = {name: value - start[name].to(value.device) for name, value in found.items()}
    norm = float(torch.stack([update.double().norm() for update in updates.values()]).norm())
    shrunk = min(1.0, privacy.clipping_norm / norm) if norm else 1.0
    for name, value in found.items():
        noise = torch.randn(value.shape, generator=generator) * privacy.deviation
        value.copy_(start[name].to(value.device) + updates[name] * shrunk + noise.to(value.device))
