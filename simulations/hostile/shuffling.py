"""The test of ABD (Hong et al., ICML 2023, arXiv 2306.02368) for images that hold a trigger, for Vision Transformers.

There a backdoor's answer survives when the input channels of a network's last convolutions are shuffled, and the
answer to an object does not. A transformer has linear layers instead: here the inputs of the last blocks' queries,
keys, values and first MLP layers are shuffled.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from simulations.hostile.attacks import TARGET
from smi_fed.inversion import SparseImages
from smi_fed.models import Classifier
from smi_fed.pipeline import TrainedTeacher
from smi_fed.tokens import is_token_model
from smi_fed.training import predict

BLOCKS, TIMES = 2, 3
"""Blocks that are shuffled, and shuffled models whose mean answer counts, as in ABD."""


def shuffled(model: Classifier, seed: int) -> Classifier:
    """A copy whose last blocks take their inputs in another order."""
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    backbone: Any = found.backbone
    with torch.no_grad():
        for block in backbone.blocks[-BLOCKS:]:
            for layer in (block.attn.qkv, block.mlp.fc1):
                order = torch.randperm(layer.weight.shape[1], generator=generator)
                layer.weight.copy_(layer.weight[:, order.to(layer.weight.device)])
    return found


def surviving(teacher: TrainedTeacher, images: SparseImages) -> list[float | None]:
    """Shares of a teacher's images of class `TARGET`, and of all others, that keep their class in shuffled models.

    None where there are no such images, or the model has no tokens.
    """
    if not is_token_model(teacher.model.backbone):
        return [None, None]
    answers = [predict(shuffled(teacher.model, seed), images.images).softmax(-1) for seed in range(TIMES)]
    kept = torch.stack(answers).mean(0).argmax(1) == images.targets
    own = images.targets == TARGET
    return [float(kept[rows].float().mean()) if bool(rows.any()) else None for rows in (own, ~own)]
