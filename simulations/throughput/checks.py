"""Is what throughput says true of real images: a whole run, and the fast path beside a plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simulations.throughput.measuring import alternating, synchronise
from smi_fed.inversion import InversionConfig, invert
from smi_fed.models import Classifier

TOLERANCE = {"float32": 1 / 255, "bfloat16": 4 / 255}
"""Largest mean difference of pixels in [0, 1] from the plain path.

A grey level in float32. In bfloat16 a gradient carries 8 bits: of the pixels whose gradient
is within 1/256 of its own size of 0 each can go a step of the rate the other way, and
patches of nearly equal attention can change places.
"""

CONFIDENCE = 0.02
"""Most that the teacher's mean probability of the target may fall behind the plain path's."""


def whole_run(
    config: InversionConfig, iterations: int, model: Classifier, targets: Tensor, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """A real `invert` from start to end, beside what the stages' medians foretell for it."""
    inversion = config.scaled(iterations)
    stops = [at for at, _ in inversion.schedule.stops]
    begins, ends = [0, *stops], [*stops, iterations]
    foretold = sum(
        (end - begin) * stage["ms"] + stage["stop_ms"] for begin, end, stage in zip(begins, ends, stages, strict=True)
    )
    times = alternating(
        {"invert": lambda: invert(model, targets, inversion, generator=torch.Generator().manual_seed(0))},
        targets.device, repeats=1, warmup=0,
    )  # fmt: skip
    return {
        "iterations": iterations,
        "schedule": str(inversion.schedule),
        "seconds": times["invert"][0],
        "seconds_from_medians": foretold / 1000,
    }


def agreement(config: InversionConfig, model: Classifier, targets: Tensor, iterations: int = 40) -> dict[str, Any]:
    """The fast path beside a plain one: float32, uncompiled, weights as they are, one image at a time.

    Adam's first steps follow the sign of a gradient, so where a gradient is nearly 0
    rounding can move a pixel the other way by whole steps, and two runs drift apart however
    exact they are. Hence the mean over pixels, and what the teacher thinks of either.
    """
    fast = config.scaled(iterations)
    plain = replace(fast, precision="float32", compile=False, batch_size=1)
    first, second = (invert(model, targets, each, generator=torch.Generator().manual_seed(0)) for each in (fast, plain))
    difference = (first.images - second.images).abs()
    both = (first.mask & second.mask).flatten(1).sum(1) / first.mask.flatten(1).sum(1)
    synchronise(targets.device)
    mean, allowed = float(difference.mean()), TOLERANCE[config.precision]
    sure = {name: confidence(model, each.images, targets) for name, each in (("fast", first), ("plain", second))}
    return {
        "agrees": mean <= allowed and sure["fast"] >= sure["plain"] - CONFIDENCE,
        "tolerance": allowed,
        "images": len(targets),
        "iterations": iterations,
        "mean_difference": mean,
        "same_patches": float(both.float().mean()),
        "confidence": sure,
    }  # fmt: skip


@torch.no_grad()
def confidence(model: Classifier, images: Tensor, targets: Tensor) -> float:
    """Mean probability that `model` in float32 gives to the targets."""
    return float(model(images.to(targets.device)).softmax(1).gather(1, targets[:, None]).mean())
