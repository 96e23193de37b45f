"""Adam over images of different age, beside torch's own for each image alone."""

import math
from types import SimpleNamespace

import pytest
import torch

from smi_fed.inversion import InversionConfig
from smi_fed.inversion.optimiser import adam_step

GRADIENTS = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
START = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -3.0]]).double()


def alone(image, steps, config):
    """One image's pixels (3,) after each of its own `steps`, by torch."""
    pixels = START[image].clone().requires_grad_()
    adam = torch.optim.Adam([pixels], betas=config.betas, eps=1e-8)
    found = []
    for step in range(steps):
        cosine = config.learning_rate_decay == "cosine"
        share = (1 + math.cos(math.pi * step / config.iterations)) / 2 if cosine else 1.0
        adam.param_groups[0]["lr"] = config.learning_rate * share
        pixels.grad = GRADIENTS[image, step].clone()
        adam.step()
        found.append(pixels.detach().clone())
    return found


def batch(pixels):
    """What the optimiser needs of a state."""
    first, second = ({"pixels": torch.zeros_like(pixels)} for _ in range(2))
    return SimpleNamespace(parameters={"pixels": pixels.clone()}, first=first, second=second, age=None)


def step(state, gradient, ages, config, still=(False, False)):
    state.parameters["pixels"].grad, state.age = gradient, torch.tensor(ages)
    adam_step(state, config, torch.tensor(still[: len(ages)]))


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_each_image_counts_its_own_steps_and_has_its_own_rate(decay):
    config = InversionConfig(iterations=8, schedule="", learning_rate=0.3, learning_rate_decay=decay, betas=(0.8, 0.9))
    state = batch(START[:1])
    for now in range(3):
        step(state, GRADIENTS[:1, now], [now], config)
    fresh = batch(START[1:])  # a second image joins the first, which is three steps old
    for group in ("parameters", "first", "second"):
        getattr(state, group)["pixels"] = torch.cat([getattr(each, group)["pixels"] for each in (state, fresh)])
    for now in range(3):
        step(state, torch.stack([GRADIENTS[0, now + 3], GRADIENTS[1, now]]), [now + 3, now], config)
    pixels = state.parameters["pixels"]
    torch.testing.assert_close(pixels, torch.stack([alone(0, 6, config)[-1], alone(1, 3, config)[-1]]))
    before = pixels.clone()
    step(state, torch.ones(2, 3).double(), [6, 3], config, still=(True, False))
    assert torch.equal(pixels[0], before[0])
    assert bool((pixels[1] != before[1]).all())
