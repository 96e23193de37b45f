"""Model, data and training loop."""

from pathlib import Path

import timm
import torch
from flwr.app import Context, UserConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

BATCH = 16


def make_model(name: str, config: UserConfig, classes: list[str]) -> nn.Module:
    """A pretrained ViT with a new head."""
    size, weights = config["image-size"], config["weights"].format(name)
    own = {"file": weights} if weights != "pretrained" else None
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=own, img_size=size, num_classes=len(classes))


def load_folder(folder: Path, size: int) -> ImageFolder:
    """Images (3, size, size) with their labels from a folder of classes."""
    transform = v2.Compose([
        v2.Resize((size, size)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    return ImageFolder(folder, transform)


def load_part(context: Context) -> ImageFolder:
    """The training images of a node: its own (`--node-config data=...`), or its part of the run's."""
    node, run = context.node_config, context.run_config
    images = load_folder(Path(node.get("data", run["data"]), "train"), run["image-size"])
    if "data" not in node:
        images.samples = images.samples[node["partition-id"] :: node["num-partitions"]]
    return images


def fit(model: nn.Module, images: ImageFolder, steps: int) -> float:
    """Fine-tune for some steps; returns the last loss."""
    torch.set_num_threads(1)  # clients of a simulation share the machine
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    sampler = RandomSampler(images, replacement=True, num_samples=BATCH * steps)
    for batch, labels in DataLoader(images, BATCH, sampler=sampler):
        loss = F.cross_entropy(model(batch), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


@torch.no_grad()
def test(model: nn.Module, images: ImageFolder) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    parts = [(model(batch), labels) for batch, labels in DataLoader(images, 64)]
    logits, labels = map(torch.cat, zip(*parts, strict=True))
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
