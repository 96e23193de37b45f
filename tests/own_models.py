"""Models as somebody else writes them. Importing this registers one, on a server and on a client alike."""

from dataclasses import dataclass

import torch
from torch import nn

from smi_fed.models import register_model

NAME = "tests-own-net"


class OwnNet(nn.Module):
    """A small convolutional network that knows nothing of timm; its parts are called like wrappers."""

    def __init__(self, num_classes=5, width=8, channels=3, pool="avg"):
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.GELU()
        )
        self.pool = pool
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        features = self.module(images).flatten(2)
        return self.head(features.mean(2) if self.pool == "avg" else features.amax(2))


@dataclass
class Output:
    logits: torch.Tensor
    loss: None = None


class Answering(nn.Module):
    """As Hugging Face's models answer: an object or a mapping."""

    def __init__(self, model, answer=Output):
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, pixel_values):
        return self.answer(logits=self.model(pixel_values))


def build_own(num_classes, width=8, pool="avg", secret=None):
    return Answering(OwnNet(num_classes, width, pool=pool))


register_model(
    NAME, build_own, image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), bounds={"width": (4, 16)},
    choices={"pool": ("avg", "max")},
)  # fmt: skip
