"""Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix.

It steps as `torch.optim.Muon` does and keeps the same state. That one computes in bfloat16
wherever it runs, one matrix after the other; without hardware for bfloat16, as on many CPUs,
this is many times slower than float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


def working_dtype(weights: Tensor) -> torch.dtype:
    """What `orthogonalise` computes in: bfloat16 on GPUs that have it, else at least float32."""
    if weights.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.promote_types(weights.dtype, torch.float32)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Each of `matrices` (b, rows, columns) with its singular values brought near 1, by Newton and Schulz.

    The quintic's coefficients are steep at 0, so that five iterations do; they leave singular
    values between 0.7 and 1.2 where they were not tiny next to the largest.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the Gram matrix of the shorter side is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices; those of one shape are orthogonalised at once.

    Args:
        params: weights of two axes.
        lr: learning rate, >= 0. That of a tall matrix is multiplied by sqrt(rows / columns).
        weight_decay: decoupled, >= 0.
        momentum: of Nesterov's kind, in [0, 1).

    Raises:
        ValueError: a weight that is not a matrix.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for weight in (each for group in self.param_groups for each in group["params"]):
            if weight.ndim != 2:
                raise ValueError(f"Muon: got a weight of shape {tuple(weight.shape)}, allowed: matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step in place from `.grad`; weights without one stay. Returns what `closure` does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
            for weights in alike.values():
                self._step_alike(weights, group)
        return loss

    def _step_alike(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of weights of one shape."""
        pull = torch.stack([self._pull(weight, group["momentum"]) for weight in weights])
        rows, columns = weights[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        for weight, direction in zip(weights, orthogonalise(pull.to(working_dtype(pull))), strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(direction, alpha=-rate)

    def _pull(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with momentum, after Nesterov."""
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)
