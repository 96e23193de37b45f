"""DENSE: a generator in place of an inversion (Zhang et al., NeurIPS 2022, section 3).

Generator and student are trained in turn, for some epochs. The generator makes images that the
clients' ensemble names as what they were made for (cross-entropy), and on which student and
ensemble disagree (the negative KL divergence where their classes differ). What it made last joins
a pool, from which the student learns the ensemble's answers.

Deviations: the generator is told the class, and its probabilities are averaged and not logits. The
student sees its images as they are, where other methods shift and mix them. Clients without
BatchNorm have no running statistics, so the loss over them is missing. The ensemble is weighted as
everywhere here and not evenly. The student's optimiser and its steps are those of all other
methods, so that there are fewer epochs (30 for 200).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.distillation import DistillationConfig
from smi_fed.distillation.shown import distillation_loss
from smi_fed.models import Classifier
from smi_fed.pipeline import TrainedTeacher, weights_of
from smi_fed.training import Optimiser, evaluating

NOISE, EPOCHS, GENERATOR_STEPS, ADVERSARIAL, RATE = 100, 30, 10, 0.5, 1e-3
"""Numbers of a generator's input, epochs, its steps in each, the weight of disagreement, and Adam's rate."""


class Generator(nn.Module):
    """From noise (b, NOISE) and classes (b,) to images (b, channels, size, size) in [0, 1], with DENSE's layers.

    Args:
        size: of the images, a multiple of 4.
    """

    def __init__(self, classes: int, channels: int, size: int, width: int = 64) -> None:
        super().__init__()
        self.start, self.width = size // 4, width
        self.embedding = nn.Embedding(classes, NOISE)
        self.first = nn.Linear(NOISE, 2 * width * self.start**2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width), nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Images of these classes."""
        seed = self.first(noise * self.embedding(classes))
        return self.layers(seed.view(len(noise), 2 * self.width, self.start, self.start))


def ensemble_log(teachers: Sequence[TrainedTeacher], weights: Tensor, images: Tensor, temperature: float) -> Tensor:
    """log of the weighted mean of the clients' probabilities (b, classes), with gradients to the images."""
    logits = torch.stack([teacher.model(images) for teacher in teachers])
    votes = weights[:, None] * (logits / temperature).softmax(-1)
    return (votes / votes.sum((0, 2), keepdim=True)).sum(0).clamp(min=1e-12).log()


def distill_by_generator(
    student: Classifier, teachers: Sequence[TrainedTeacher], config: DistillationConfig, generator: torch.Generator
) -> None:
    """Teach `student`, in place, what the teachers say of images that a generator learns to make.

    Args:
        config: its steps, batch size, temperature and optimiser are the student's.
    """
    device = student.mean.device
    weights = weights_of(teachers, config.ensemble).to(device)
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    maker = Generator(weights.shape[1], len(student.mean), student.image_size[0]).to(device).train()
    adam, optimiser = torch.optim.Adam(maker.parameters(), RATE), Optimiser(student, config)
    pool = list[tuple[Tensor, Tensor]]()
    epochs = min(EPOCHS, config.steps)
    with evaluating(*(teacher.model for teacher in teachers)):
        for epoch in range(epochs):
            student.eval()
            images = _made(maker, adam, student, teachers, weights, config.batch_size, generator)
            with torch.no_grad():
                pool.append((images, ensemble_log(teachers, weights, images, config.temperature).exp()))
            shown, said = (torch.cat(each) for each in zip(*pool, strict=True))
            student.train()
            for _ in range((epoch + 1) * config.steps // epochs - epoch * config.steps // epochs):
                rows = torch.randint(len(shown), (config.batch_size,), generator=generator).to(device)
                optimiser.step(distillation_loss(student(shown[rows]), said[rows], config.temperature))
    student.eval()


def _made(
    maker: Generator, adam: torch.optim.Adam, student: Classifier, teachers: Sequence[TrainedTeacher],
    weights: Tensor, count: int, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """What the generator makes after its steps of one epoch (count, channels, size, size)."""
    known = (weights > 0).any(0).nonzero()[:, 0].cpu()
    noise = torch.randn(count, NOISE, generator=generator).to(weights.device)
    classes = known[torch.randint(len(known), (count,), generator=generator)].to(weights.device)
    for _ in range(GENERATOR_STEPS):
        adam.zero_grad()
        generator_loss(maker(noise, classes), classes, student, teachers, weights).backward()
        adam.step()
    return maker(noise, classes).detach()


def generator_loss(
    images: Tensor, classes: Tensor, student: Classifier, teachers: Sequence[TrainedTeacher], weights: Tensor
) -> Tensor:
    """Cross-entropy of the ensemble, less `ADVERSARIAL` times where student and ensemble disagree (scalar)."""
    said, own = ensemble_log(teachers, weights, images, 1.0), student(images).log_softmax(-1)
    differ = (said.argmax(1) != own.argmax(1)).float()
    disagreement = F.kl_div(own, said, reduction="none", log_target=True).sum(1)
    return F.nll_loss(said, classes) - ADVERSARIAL * (differ * disagreement).mean()
