"""Presets for pretrained models leave training from scratch as it was, bit by bit."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smi_fed.config import load_settings
from smi_fed.data import load_images
from smi_fed.models import build_seeded
from smi_fed.training import train
from tests.reference.plain_training import train_plainly

SETTINGS = load_settings(Path(__file__).parents[1] / "conf", "")
DRAWS = "4d927d5d8e2ca941"
"""Of the generator's state after 25 steps of 32 images: which draws are made, and in which order."""


@pytest.mark.parametrize("name", list(SETTINGS.model.clients)[:2])
@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_the_digits_demo_takes_the_very_same_steps(name, optimiser):
    data = load_images(SETTINGS.data)[0].select(range(300))
    config = replace(SETTINGS.client.training, steps=25, optimiser=optimiser)
    found = []
    for way in (lambda m, g: train(m, data, config, generator=g), lambda m, g: train_plainly(m, data, config, g)):
        model, generator = build_seeded(SETTINGS.model.clients[name], 0), torch.Generator().manual_seed(5)
        loss = way(model, generator)
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()
        assert state[:16] == DRAWS
        found.append((loss, model.state_dict()))
    (loss, weights), (correct, expected) = found
    assert loss == correct
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
