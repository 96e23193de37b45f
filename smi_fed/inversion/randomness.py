"""Randomness as a pure function of (key, image id, step).

Counter-based: no state is kept, so splitting a batch, resuming and refilling give the
same images. The mixing function is splitmix64's finaliser (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

START, JITTER, FLIP, SELECT = range(4)
"""Streams, so that one use does not shift another's draws."""


def draw_key(generator: torch.Generator | None) -> int:
    """One integer key, the only thing that is ever taken from the generator."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _wrap(x: int) -> int:
    """The int64 with the same 64 bits as `x`."""
    return (x + 2**63) % 2**64 - 2**63


def uniform(key: int, ids: Tensor, step: Tensor | int, stream: int, count: int) -> Tensor:
    """Uniform draws in [0, 1).

    Args:
        key: from `draw_key`.
        ids: (b,) int64 image ids.
        step: int, or (b,) int64, the age of each image in iterations.
        stream: what the draws are for.
        count: draws per image.

    Returns:
        (b, count) float64.
    """
    step = torch.as_tensor(step, device=ids.device)
    row = _mix(ids * _GOLDEN + _wrap(key))
    row = _mix(row + (step * 8 + stream) * _GOLDEN)
    counter = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    return _shift(_mix(row[:, None] + counter), 11).double() * 2.0**-53


def normal(key: int, ids: Tensor, step: Tensor | int, stream: int, count: int) -> Tensor:
    """Standard normal draws (b, count) float64, by Box and Muller; arguments as for `uniform`."""
    u = uniform(key, ids, step, stream, 2 * count)
    radius = (-2 * torch.log1p(-u[:, :count])).sqrt()
    return radius * (2 * math.pi * u[:, count:]).cos()


def integers(key: int, ids: Tensor, step: Tensor | int, stream: int, count: int, largest: int) -> Tensor:
    """Draws (b, count) int64 from -largest to largest, both possible; arguments as for `uniform`."""
    return (uniform(key, ids, step, stream, count) * (2 * largest + 1)).long() - largest
