"""FedDF: distillation on public pictures (Lin et al., NeurIPS 2020, algorithm 1), for one round.

The student learns what the clients say together on pictures that need no labels. What is public here are
the shapes of `data=shapes`, in grey for digits: unlike what clients have, as public pictures mostly
are.

Deviations: softened probabilities are averaged, and not logits, as everywhere here. The student
starts at random, since its architecture is nobody's, and not from an average. Its optimiser and
steps are those of all other methods.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from simulations.methods import uninverted
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.sparse_images import SparseImages


def public_pictures(settings: Settings, count: int, generator: torch.Generator) -> SparseImages:
    """So many of them at the student's size and channels, in [0, 1]; their classes are not theirs, and drawn."""
    own = settings.data
    shapes, _ = load_images(replace(own, source="shapes", channels=3))
    rows = torch.randperm(len(shapes), generator=generator)[:count]
    pixels = shapes.images[rows]
    pixels = pixels if own.channels == 3 else pixels.mean(1, keepdim=True)
    targets = torch.randint(settings.model.student.num_classes, (len(rows),), generator=generator)
    return uninverted(pixels, targets, -1)
