"""Supervised training and evaluation of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.checks import Betas, Count, Natural, NonNegative, Positive, Share, checked
from smi_fed.data import Images, ImageSet
from smi_fed.muon import Muon
from smi_fed.tokens import roll_images


@checked
class TrainingConfig:
    """Settings of `train`.

    Args:
        steps: optimiser steps.
        batch_size: images per step, with replacement across epochs.
        optimiser: muon (hidden matrices by Muon, everything else by AdamW) | adamw.
        learning_rate: AdamW's peak, above 0.
        muon_learning_rate: Muon's peak, above 0.
        betas: AdamW's.
        weight_decay: of both, >= 0.
        warmup: share of the steps that the rates rise, inside (0, 1); then they fall by a cosine.
        clip: largest gradient norm, above 0.
        jitter: largest cyclic shift of training images in pixels.

    Raises:
        SettingError: naming what cannot be.
    """

    steps: Count = 300
    batch_size: Count = 64
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 3e-3
    muon_learning_rate: Positive = 0.01
    betas: Betas = (0.9, 0.95)
    weight_decay: NonNegative = 0.05
    warmup: Share = 0.15
    clip: Positive = 1.0
    jitter: Natural = 1


class Optimiser:
    """Muon and AdamW for one model, with warm-up and cosine decay of their rates.

    A small ViT from random weights learns several times faster when its hidden matrices are
    stepped by Muon (Jordan et al., 2024: momentum, then the nearest orthogonal matrix) than
    by AdamW alone; Muon is not meant for vectors, embeddings and the head.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.weights = list(model.parameters())
        self.clip = config.clip
        muon = config.optimiser == "muon"
        named = model.named_parameters() if muon else ()
        hidden = [w for name, w in named if w.ndim == 2 and "blocks." in name and name.endswith(".weight")]
        chosen = {id(weight) for weight in hidden}
        rest = [weight for weight in self.weights if id(weight) not in chosen]
        adamw = torch.optim.AdamW(rest, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            self.parts.append(Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, _rate(config)) for part in self.parts]

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, with the gradient's norm clipped."""
        for part in self.parts:
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        for part in self.parts:
            part.step()
        for schedule in self.schedules:
            schedule.step()


def _rate(config: TrainingConfig) -> Callable[[int], float]:
    """Share of the peak rate at a step: a line up, then half a cosine down to 0."""
    rise = max(1, round(config.warmup * config.steps))

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))

    return rate


def shift_images(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Each image (b, c, h, w) shifted cyclically by its own draw of at most `largest` pixels per axis."""
    shift = draw_shift(len(images), largest, generator)
    return images if shift is None else roll_images(images, shift.to(images.device))


def draw_shift(count: int, largest: int, generator: torch.Generator) -> Tensor | None:
    """(count, 2) pixels per axis, each from -largest to largest; None, without a draw, where `largest` is 0."""
    return torch.randint(-largest, largest + 1, (2, count), generator=generator).T if largest else None


@contextmanager
def seeded_torch(generator: torch.Generator) -> Iterator[None]:
    """What draws from torch's own state inside, such as dropout, is a function of the state of `generator`.

    Nothing is taken from `generator`: its draws are the same with dropout and without. Torch's
    state, on the CPU and on CUDA devices, is as before afterwards.
    """
    if generator is torch.default_generator:
        yield
        return
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (), generator=copy, device=copy.device))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices not yet in use
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images (b, c, h, w), labels (b,)) -> scalar."""


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    data: ImageSet,
    config: TrainingConfig,
    *,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
    progress: Callable[[int, Tensor], None] | None = None,
) -> float:
    """Train in place on the model's own device; leaves it in evaluation mode.

    Args:
        generator: source of every random choice, those of dropout and stochastic depth too.
        loss: what is minimised.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: there is no image to train on.
    """
    if not len(data):
        raise ValueError("cannot train on an empty partition: got 0 images")
    device = next(model.parameters()).device
    images, labels = data.images.to(device), data.labels.to(device)
    optimiser = Optimiser(model, config)
    losses = []
    model.train()
    with seeded_torch(generator):
        for step in range(config.steps):
            rows = torch.randint(len(data), (config.batch_size,), generator=generator).to(device)
            batch = shift_images(images[rows], config.jitter, generator)
            now = loss(model, batch, labels[rows])
            optimiser.step(now)
            losses.append(now.detach())
            if progress is not None:
                progress(step + 1, losses[-1])
    model.eval()
    return float(torch.stack(losses[-max(1, config.steps // 10) :]).mean())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is as before afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def predict(model: nn.Module, images: Images, batch_size: int = 256) -> Tensor:
    """Logits (n, classes) on the CPU, in evaluation mode; the model's mode is as before afterwards."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of images whose class the model names; in [0, 1]."""
    return float((predict(model, data.images).argmax(1) == data.labels).float().mean())
