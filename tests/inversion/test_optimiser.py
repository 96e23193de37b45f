"""Adam over images of different age, beside torch's own for each image alone."""

import math

import pytest
import torch

from smi_fed.inversion import InversionConfig
from smi_fed.inversion.optimiser import Moments, adam_step

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


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_each_image_counts_its_own_steps_and_has_its_own_rate(decay):
    config = InversionConfig(iterations=8, schedule="", learning_rate=0.3, learning_rate_decay=decay, betas=(0.8, 0.9))
    pixels = {"pixels": START[:1].clone()}
    moments = Moments.zeros(pixels)
    for now in range(3):
        pixels["pixels"].grad = GRADIENTS[:1, now]
        adam_step(pixels, moments, torch.tensor([now]), config)
    fresh = {"pixels": START[1:].clone()}  # a second image joins the first, which is three steps old
    for one, other in ((moments.first, fresh), (moments.second, fresh)):
        one["pixels"] = torch.cat([one["pixels"], torch.zeros_like(other["pixels"])])
    pixels = {"pixels": torch.cat([pixels["pixels"], fresh["pixels"]])}
    for now in range(3):
        pixels["pixels"].grad = torch.stack([GRADIENTS[0, now + 3], GRADIENTS[1, now]])
        adam_step(pixels, moments, torch.tensor([now + 3, now]), config)
    torch.testing.assert_close(pixels["pixels"], torch.stack([alone(0, 6, config)[-1], alone(1, 3, config)[-1]]))
    before = pixels["pixels"].clone()
    pixels["pixels"].grad = torch.ones(2, 3).double()
    adam_step(pixels, moments, torch.tensor([6, 3]), config, still=torch.tensor([True, False]))
    assert torch.equal(pixels["pixels"][0], before[0])
    assert bool((pixels["pixels"][1] != before[1]).all())
