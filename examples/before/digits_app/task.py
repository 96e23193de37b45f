"""Model, data and training loop."""

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = {"img_size": 32, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 4}


def make_model(patch_size: int) -> nn.Module:
    """A small ViT with random weights."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, patch_size=patch_size, **SHAPE)


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images, training labels, test labels; images are (n, 1, 32, 32) in [0, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=32, mode="bilinear")
    return train_test_split(images, torch.tensor(digits.target), test_size=0.2, random_state=0)


def load_partition(number: int, count: int) -> tuple[Tensor, Tensor]:
    """The training images and labels of client `number` of `count`."""
    images, _, labels, _ = load_split()
    return images[number::count], labels[number::count]


def fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> float:
    """Train for some steps; returns the last loss."""
    torch.set_num_threads(1)  # clients of a simulation share the machine
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = model.eval()(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
