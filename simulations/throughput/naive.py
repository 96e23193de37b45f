"""Dense inversion as it is commonly published: the baseline that throughput is told against.

Nothing here is a straw man that nobody runs: each cost is in public code of the field.
The weights are not frozen, so every backward computes their gradients too; attention is
not fused, and every block's map is kept; the loss is read on the host in each step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.models import Classifier


class NaiveInversion:
    """Cross-entropy and total variation on whole images in float32, by Adam.

    Args:
        model: copied, since its weights will need gradients.
        targets: (b,) class indices.
    """

    def __init__(self, model: Classifier, targets: Tensor, seed: int = 0) -> None:
        self.vit: Any = copy.deepcopy(model.backbone).float().requires_grad_().eval()
        self.targets = targets
        self.low, self.high = (0 - model.mean) / model.std, (1 - model.mean) / model.std
        generator = torch.Generator(targets.device).manual_seed(seed)
        size = (len(targets), model.mean.shape[0], *model.image_size)
        self.images = torch.randn(size, device=targets.device, generator=generator).requires_grad_()
        self.optimiser = torch.optim.Adam([self.images], lr=0.25, betas=(0.5, 0.99))
        self.best, self.best_loss = self.images.data, float("inf")
        self.maps: list[Tensor] = []
        for block in self.vit.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(self._keep_map)

    def _keep_map(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.maps.append(output)

    def step(self) -> None:
        """One iteration."""
        self.maps.clear()
        self.optimiser.zero_grad()
        self.vit.zero_grad()
        rows, columns = (int(shift) for shift in torch.randint(-30, 31, (2,)))
        view = torch.roll(self.images, (rows, columns), (2, 3))
        if bool(torch.rand(()) < 0.5):
            view = view.flip(3)
        loss = F.cross_entropy(self.vit(view), self.targets) + 1e-4 * total_variation(view)
        if loss.item() < self.best_loss:
            self.best, self.best_loss = self.images.data, loss.item()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            self.images.clamp_(self.low, self.high)


def total_variation(images: Tensor) -> Tensor:
    """Norms over the batch of horizontal, vertical and both diagonal differences."""
    differences = (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([each.norm() for each in differences]).sum()
